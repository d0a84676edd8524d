// gemm.cu against plain loops in fp64: both dtypes, both kinds and orientations of the right operand, every tile.
#include <optional>

#include "support.hpp"

namespace {

using namespace driver;
using pyadapt::cuda::Gemm;
using pyadapt::cuda::Launch;
using pyadapt::cuda::Matrix;

enum class Tile { large, small };

struct Problem {
    int M, N, K;
    DType dtype = DType::f16;
    bool bytes = false;          // right operand of int8
    bool along_columns = false;  // and its layout
    Tile tile = Tile::small;     // which the launcher is to choose; sm_75 has one
    bool tight = false;          // a multiprocessor with little shared memory
    int gap = 0, shift = 0;      // of left, right and out: elements between rows, elements from an aligned address
    float alpha = 1;
    bool scaled = false;  // column_scale
    std::optional<DType> bias = {};
    bool add_out = false;
    int rank = 0;
    DType low_dtype = DType::f32;
    bool low_transposed = false;  // low_right with unit stride along N
    double dropout = 0;
    bool seed_on_device = false;
    std::optional<double> special = {};      // one element of left
    std::optional<double> low_special = {};  // one of low_left

    std::string name() const {
        const auto part = [](bool there, const std::string& text) { return there ? " " + text : std::string(); };
        return std::to_string(M) + "x" + std::to_string(N) + "x" + std::to_string(K) + " " + pyadapt::name_of(dtype) +
               part(bytes, "int8") + part(along_columns, "along columns") +
               (tile == Tile::large ? " large" : " small") +
               part(tight, "tight") + part(gap, "gap " + std::to_string(gap)) +
               part(shift, "shift " + std::to_string(shift)) + part(scaled, "scaled") +
               part(bias.has_value(), std::string("bias ") + (bias ? pyadapt::name_of(*bias) : "")) +
               part(add_out, "on out") + part(rank, "rank " + std::to_string(rank)) +
               part(rank && low_dtype != DType::f32, pyadapt::name_of(low_dtype)) + part(low_transposed, "transposed") +
               part(dropout, "dropout " + std::to_string(dropout)) + part(seed_on_device, "seed on device") +
               part(special.has_value(), "special") +
               part(low_special.has_value(), "special low-rank");
    }
};

// rows x columns elements with a gap between rows, which stays NaN.
Array grid(DType dtype, int rows, int columns, int gap, int shift, Random& random, double low = -1, double high = 1) {
    const std::int64_t stride = columns + gap;
    Array array(dtype, rows && columns ? (rows - 1) * stride + columns : 0, shift);
    for (int row = 0; row < rows; ++row)
        for (int k = 0; k < columns; ++k)
            array.set(row * stride + k, dtype == DType::i8 ? double(random() % 256) - 128 : uniform(random, low, high));
    return array;
}

Launch launch_of(const Problem& p) {
    Launch launch = launch_settings(p.tile == Tile::large ? 1 : 1000);
    if (p.tight && launch.capability == 80) launch.capability = 86;
    return launch;
}

void solve(Check& check, const Problem& p) {
    Random random(17);
    const DType right_dtype = p.bytes ? DType::i8 : p.dtype;
    Array left = grid(p.dtype, p.M, p.K, p.gap, p.shift, random);
    const int right_rows = p.along_columns ? p.K : p.N, right_columns = p.along_columns ? p.N : p.K;
    const Array right = grid(right_dtype, right_rows, right_columns, p.gap, p.shift, random);
    const std::int64_t left_stride = p.K + p.gap, right_stride = right_columns + p.gap, out_stride = p.N + p.gap;
    if (p.special) left.set((p.M / 2) * left_stride + p.K - 1, *p.special);
    const Array scale = Array::random(DType::f32, p.N, random, 1, 0.5, 2);
    const Array bias = Array::random(p.bias.value_or(DType::f32), p.N, random, 1);
    Array low_left = Array::random(DType::f32, std::int64_t(p.M) * p.rank, random, 1);
    if (p.low_special) low_left.set(p.M / 2 * p.rank, *p.low_special);
    // Three elements between rows, which are NaN, in either layout.
    const Array low_right = p.low_transposed ? grid(p.low_dtype, p.rank, p.N, 3, 1, random)
                                             : grid(p.low_dtype, p.N, p.rank, 3, 1, random);
    const std::int64_t low_row = p.low_transposed ? 1 : p.rank + 3, low_column = p.low_transposed ? p.N + 3 : 1;
    Array out = p.add_out ? grid(p.dtype, p.M, p.N, p.gap, p.shift, random)
                          : Array(p.dtype, p.M && p.N ? (p.M - 1) * out_stride + p.N : 0, p.shift);
    Array before(DType::f32, out.count());
    for (std::int64_t i = 0; i < out.count(); ++i) before.set(i, out.get(i));
    Array seed(DType::i64, 1);
    const float low_scale = 1.5f;

    Gemm product = {};
    product.M = p.M, product.N = p.N, product.K = p.K, product.dtype = p.dtype;
    product.left = p.K ? left.data() : nullptr, product.left_stride = left_stride;
    product.right = p.K ? right.data() : nullptr, product.right_stride = right_stride;
    product.right_dtype = right_dtype, product.right_along_columns = p.along_columns;
    product.alpha = p.alpha, product.column_scale = p.scaled ? scale.as<float>() : nullptr;
    product.bias = p.bias ? bias.data() : nullptr, product.bias_dtype = p.bias.value_or(DType::f32);
    product.add_out = p.add_out, product.rank = p.rank;
    product.low_left = p.rank ? low_left.as<float>() : nullptr;
    product.low_right = {p.rank ? low_right.data() : nullptr, p.low_dtype, low_row, low_column};
    product.low_scale = low_scale;
    product.dropout = dropout_of(p.dropout, 0x123456789abcdefull, p.seed_on_device ? &seed : nullptr);
    product.out = out.data(), product.out_stride = out_stride;
    const long blocks = emulator::counters.blocks;
    check.succeeded(pyadapt::cuda::gemm(product, launch_of(p)));
    const int tile_rows = PYADAPT_ARCH < 800 || p.tile == Tile::large ? 128 : 64;
    const int tile_columns = PYADAPT_ARCH >= 800 && p.tile == Tile::large ? 128 : 64;
    const int tiles = (p.M + tile_rows - 1) / tile_rows * ((p.N + tile_columns - 1) / tile_columns);
    check.require(emulator::counters.blocks - blocks == tiles, "another tile than the case is for");

    // tf32 has 10 bits of mantissa; each of two factors is rounded to them.
    const double low_epsilon = PYADAPT_ARCH >= 800 ? 0x1p-10 : 0x1p-21;
    for (int m = 0; m < p.M; ++m) {
        for (int n = 0; n < p.N; ++n) {
            const std::int64_t at = m * out_stride + n;
            double frozen = p.add_out ? before.get(at) : 0, magnitude = std::fabs(frozen);
            for (int k = 0; k < p.K; ++k) {
                const std::int64_t in_right = p.along_columns ? k * right_stride + n : n * right_stride + k;
                const double term = left.get(m * left_stride + k) * right.get(in_right);
                frozen += term, magnitude += std::fabs(term);
            }
            const double factor = p.alpha * (p.scaled ? scale.get(n) : 1.0);
            double low = 0, low_magnitude = 0;
            if (keeps(product.dropout, m, n))
                for (int r = 0; r < p.rank; ++r) {
                    const double term = double(low_scale) * product.dropout.scale * low_left.get(m * p.rank + r) *
                                        low_right.get(n * low_row + r * low_column);
                    low += term, low_magnitude += std::fabs(term);
                }
            const double want = frozen * factor + low + (p.bias ? bias.get(n) : 0.0);
            const double tolerance = epsilon_of(p.dtype) * std::fabs(want) + 0x1p-20 * std::fabs(factor) * magnitude +
                                     low_epsilon * low_magnitude + 0x1p-24;
            check(out.get(at), want, tolerance, "out", at);
        }
        for (int n = p.N; n < out_stride && m + 1 < p.M; ++n)  // what lies between the rows is nobody's
            check(out.get(m * out_stride + n), NAN, 0, "gap", m * out_stride + n);
    }
}

std::vector<Case> cases() {
    std::vector<Problem> problems;
    // Every kernel: ragged to all sides, with all terms, a depth that goes round the stages. Sizes and one
    // multiprocessor lead to the large tile.
    for (const DType dtype : half_dtypes())
        for (const bool bytes : {false, true})
            for (const bool along_columns : {false, true}) {
                Problem p = {70, 88, 168, dtype, bytes, along_columns};
                p.scaled = bytes, p.bias = DType::f32, p.rank = 16, p.alpha = 0.75f;
                p.dropout = along_columns ? 0.3 : 0;
                problems.push_back(p);
                p.M = 130, p.N = 200, p.tile = Tile::large, p.rank = 3, p.bias = dtype;
                problems.push_back(p);
                // Rows that begin at any element.
                p = {19, 37, 75, dtype, bytes, along_columns};
                p.gap = 3, p.shift = 1, p.rank = 5, p.low_transposed = true;
                problems.push_back(p);
                p.M = 67, p.N = 71, p.tile = Tile::large, p.dropout = 0.3;
                problems.push_back(p);
            }
    const auto add = [&](Problem p, auto change) { change(p), problems.push_back(p); };
    const Problem small = {33, 20, 64};
    // Three stages and four, once round and more often, and fewer steps than stages.
    for (const int K : {1, 32, 33, 64, 96, 128, 256})
        for (const bool tight : {false, true})
            add({65, 66, K}, [&](Problem& p) { p.tight = tight, p.tile = Tile::large, p.along_columns = K % 64 == 0; });
    // The low-rank term.
    for (const int rank : {1, 8, 40})
        for (const bool transposed : {false, true})
            add(small, [&](Problem& p) { p.rank = rank, p.low_transposed = transposed, p.low_dtype = DType::f16; });
    add(small, [](Problem& p) { p.rank = 16, p.low_dtype = DType::bf16; });
    for (const double dropout : {0.3, 1.0})
        add({37, 70, 40}, [&](Problem& p) { p.rank = 20, p.dropout = dropout, p.seed_on_device = true; });
    add({100, 150, 8}, [](Problem& p) { p.rank = 20, p.dropout = 0.5, p.along_columns = true, p.tile = Tile::large; });
    // Out holds the product already, or is all there is.
    for (const int gap : {0, 1}) {
        add({70, 68, 0}, [&](Problem& p) {
            p.add_out = true, p.gap = gap, p.rank = 16, p.dropout = 0.3, p.scaled = true, p.bias = DType::f16;
        });
        add({100, 130, 0}, [&](Problem& p) { p.add_out = true, p.gap = gap, p.rank = 4, p.tile = Tile::large; });
    }
    add({5, 6, 0}, [](Problem& p) { p.rank = 2; });
    add({5, 6, 0}, [](Problem&) {});
    // One row, one column, nothing.
    add({1, 200, 96}, [](Problem& p) { p.bytes = true, p.scaled = true, p.bias = DType::bf16; });
    add({200, 1, 96}, [](Problem& p) { p.along_columns = true, p.shift = 1; });
    add({1, 1, 1}, [](Problem& p) { p.rank = 1; });
    add({0, 8, 8}, [](Problem&) {});
    add({8, 0, 8}, [](Problem&) {});
    // Groups of tiles, the last of them not whole.
    add({600, 130, 16}, [](Problem&) {});
    // NaN and infinity reach their row and no other.
    for (const double special : {double(NAN), double(INFINITY)})
        add({20, 20, 37}, [&](Problem& p) { p.special = special, p.dropout = 1, p.rank = 2; });

    // Whatever is dropped is dropped.
    for (const double dropout : {0.3, 1.0})
        add({20, 20, 8}, [&](Problem& p) { p.low_special = double(NAN), p.dropout = dropout, p.rank = 2; });

    std::vector<Case> cases;
    for (const Problem& p : problems) {
        cases.push_back({p.name(), [p](Check& check) { solve(check, p); }});
    }
    cases.push_back({"bf16 before sm_80", [](Check& check) {
                         Gemm product = {};
                         product.M = product.N = 1, product.dtype = DType::bf16;
                         Launch launch = launch_settings();
                         launch.capability = 75;
                         check.require(pyadapt::cuda::gemm(product, launch) == cudaErrorNotSupported, "is not refused");
                     }});
    return cases;
}

}  // namespace

int main(int argc, char** argv) { return driver::run(argc, argv, cases()); }
