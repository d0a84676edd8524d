// shrink.cu: the S pass against sums in double precision.
#include "support.hpp"

namespace {

using namespace driver;
using pyadapt::cuda::Launch;
using pyadapt::cuda::Matrix;
using pyadapt::cuda::Shrink;

// Of fp32: what a sum of products may be off, over the sum of their magnitudes. tf32 would be off by 2^-12.
constexpr double sum_error = 0x1p-21;

struct Problem {
    int M, K, rank;
    DType dtype = DType::f16;
    DType small_dtype = DType::f32;
    int multiprocessors = 1;   // with more, the depth is cut into slices
    int gap = 0;               // elements between rows of x
    int shift = 0;             // elements between an aligned address and the first of x
    int small_gap = 0;         // elements between rows of small, or between its columns where transposed
    int small_shift = 0;       // as shift
    bool transposed = false;   // small has unit stride along the rank
    double dropout = 0;
    bool device_seed = false;
    int slices = 0;            // where it matters to a case; the workspace shows it

    std::int64_t stride() const { return K + gap; }
    std::int64_t count() const { return M == 0 || K == 0 ? 0 : (M - 1) * stride() + K; }
    std::int64_t row_stride() const { return transposed ? 1 : K + small_gap; }
    std::int64_t column_stride() const { return transposed ? rank + small_gap : 1; }
    std::int64_t small_count() const {
        return rank == 0 || K == 0 ? 0 : (rank - 1) * row_stride() + (K - 1) * column_stride() + 1;
    }
    std::string name() const {
        std::string text = std::to_string(M) + "x" + std::to_string(K) + " rank " + std::to_string(rank) + " " +
                           pyadapt::name_of(dtype) + " " + std::to_string(multiprocessors);
        if (small_dtype != DType::f32) text += std::string(" small ") + pyadapt::name_of(small_dtype);
        if (gap) text += " gap " + std::to_string(gap);
        if (shift) text += " shift " + std::to_string(shift);
        if (small_gap) text += " small gap " + std::to_string(small_gap);
        if (small_shift) text += " small shift " + std::to_string(small_shift);
        if (transposed) text += " transposed";
        if (dropout > 0) text += " dropout " + std::to_string(dropout) + (device_seed ? " device seed" : "");
        return text;
    }
};

struct Operands {
    Array x, small;
};

Operands random_operands(const Problem& problem) {
    Random random(21);
    return {Array::random(problem.dtype, problem.count(), random, problem.shift),
            Array::random(problem.small_dtype, problem.small_count(), random, problem.small_shift)};
}

void check_shrink(Check& check, const Problem& problem, const Operands& operands) {
    const auto& [x, small] = operands;
    const int M = problem.M, K = problem.K, rank = problem.rank;
    Array seed(DType::i64, 1), out(DType::f32, std::int64_t{M} * rank, 1);
    Shrink pass = {};
    pass.M = M;
    pass.K = K;
    pass.rank = rank;
    pass.dtype = problem.dtype;
    const Launch launch = launch_settings(problem.multiprocessors);
    // The layer asks for the workspace before it has the operands.
    const Memory workspace(shrink_workspace(pass, launch));
    const auto slice_bytes = static_cast<std::size_t>(M) * rank * sizeof(float);
    if (problem.slices)
        check.require(workspace.bytes() == (problem.slices > 1) * problem.slices * slice_bytes,
                      "another number of slices than this case is for");
    pass.x = x.data();
    pass.x_stride = problem.stride();
    pass.small = Matrix{small.data(), problem.small_dtype, problem.row_stride(), problem.column_stride()};
    pass.dropout = dropout_of(problem.dropout, 0xfedcba9876543210ull, problem.device_seed ? &seed : nullptr);
    pass.alpha = -0.75f;
    pass.out = out.as<float>();
    pass.workspace = workspace.data();
    check.succeeded(shrink(pass, launch));

    for (int m = 0; m < M; ++m) {
        std::vector<double> row(K);
        for (int k = 0; k < K; ++k) row[k] = keeps(pass.dropout, m, k) ? x.get(m * problem.stride() + k) : 0.0;
        for (int j = 0; j < rank; ++j) {
            double sum = 0, magnitude = 0;
            for (int k = 0; k < K; ++k) {
                const double term = row[k] * small.get(j * problem.row_stride() + k * problem.column_stride());
                sum += term;
                magnitude += std::fabs(term);
            }
            const double scale = static_cast<double>(pass.alpha) * pass.dropout.scale;
            const double tolerance = std::isfinite(magnitude) ? magnitude * std::fabs(scale) * sum_error : 0;
            check(out.get(std::int64_t{m} * rank + j), sum * scale, tolerance, "out", std::int64_t{m} * rank + j);
        }
    }
}

std::vector<Problem> problems() {
    std::vector<Problem> list;
    const DType other = has_bf16 ? DType::bf16 : DType::f16;
    for (DType dtype : half_dtypes()) {
        list.push_back({1, 64, 1, dtype});
        list.push_back({5, 96, 3, dtype});
        list.push_back({37, 264, 8, dtype});
        list.push_back({16, 160, 16, dtype});
        list.push_back({64, 136, 20, dtype});
        list.push_back({40, 72, 40, dtype});
        list.push_back({40, 72, 70, dtype});
        Problem problem = {33, 328, 16, dtype};
        problem.multiprocessors = 132;
        problem.slices = 2;
        list.push_back(problem);
        problem = {20, 424, 36, dtype};
        problem.slices = 1;
        list.push_back(problem);
        problem = {9, 270, 16, dtype};
        problem.gap = 2;  // aligned rows, and an end in the middle of 16 bytes
        problem.dropout = 0.3;
        list.push_back(problem);
        problem.gap = 0;  // rows aligned to 4 bytes
        list.push_back(problem);
        problem = {20, 264, 9, dtype};
        problem.shift = 3;
        problem.dropout = 0.3;
        problem.device_seed = true;
        list.push_back(problem);
    }
    for (DType small_dtype : {other, DType::f16, DType::f32})
        for (bool transposed : {false, true}) {
            Problem problem = {18, 300, 11, other, small_dtype};
            problem.transposed = transposed;
            problem.small_gap = 4;
            list.push_back(problem);
            problem.small_shift = 1;
            problem.gap = 4;
            list.push_back(problem);
        }
    list.push_back({0, 64, 16});
    list.push_back({3, 64, 0});
    list.push_back({3, 0, 16});
    Problem all_dropped = {7, 100, 5};
    all_dropped.dropout = 1;
    list.push_back(all_dropped);
    return list;
}

// The second block of rows, and warps without any.
std::vector<Problem> large_problems() {
    Problem split = {300, 1000, 16, has_bf16 ? DType::bf16 : DType::f16};
    split.multiprocessors = 132;
    split.slices = 8;
    split.dropout = 0.3;
    Problem ranks = {270, 520, 130};
    ranks.multiprocessors = 132;
    ranks.slices = 4;
    return {split, ranks};
}

// Infinities and NaN, in x and in small, where tf32 parts of a number could make NaN of an infinity.
void check_not_finite(Check& check, DType small_dtype, int multiprocessors) {
    Problem problem = {40, 300, 10, DType::f16, small_dtype};
    problem.multiprocessors = multiprocessors;
    problem.slices = multiprocessors > 1 ? 2 : 0;
    Operands operands = random_operands(problem);
    auto& [x, small] = operands;
    for (int m : {0, 3, 17, 39}) x.set(m * problem.stride() + 7 * m % problem.K, m == 17 ? NAN : INFINITY);
    x.set(5 * problem.stride() + 2, INFINITY);
    x.set(5 * problem.stride() + 200, -INFINITY);
    small.set(3 * problem.row_stride() + 131, INFINITY);
    small.set(7 * problem.row_stride() + 32, NAN);
    small.set(9 * problem.row_stride(), 1);  // exact in tf32: the low part is 0
    check_shrink(check, problem, operands);
}

// A factor that is dropped is no factor: NaN in x does not matter where the mask has taken it away.
void check_dropped_nan(Check& check) {
    Problem problem = {12, 90, 4};
    problem.dropout = 0.3;
    Operands operands = random_operands(problem);
    const pyadapt::cuda::DeviceDropout dropout = dropout_of(problem.dropout, 0xfedcba9876543210ull);
    for (int m = 0; m < problem.M; ++m)
        for (int k = 0; k < problem.K; ++k)
            if (!keeps(dropout, m, k)) operands.x.set(m * problem.stride() + k, NAN);
    check_shrink(check, problem, operands);
}

// Values at the ends of fp16 and small ones far outside it.
void check_range(Check& check, double small_size) {
    Problem problem = {10, 200, 12};
    Random random(8);
    const Operands operands = {Array::random(DType::f16, problem.count(), random, 0, -65000, 65000),
                               Array::random(DType::f32, problem.small_count(), random, 0, -small_size, small_size)};
    check_shrink(check, problem, operands);
}

std::vector<Case> cases() {
    std::vector<Case> list;
    for (const Problem& problem : problems())
        list.push_back({problem.name(), [=](Check& check) {
                            check.require(true, "nothing");  // a case may have no element
                            check_shrink(check, problem, random_operands(problem));
                        }});
    for (const Problem& problem : large_problems())
        list.push_back({problem.name(),
                        [=](Check& check) { check_shrink(check, problem, random_operands(problem)); }, Size::large});
    for (int multiprocessors : {1, 132})
        for (DType small_dtype : {DType::f32, DType::f16})
            list.push_back({std::string("not finite, small ") + pyadapt::name_of(small_dtype) + " " +
                                std::to_string(multiprocessors),
                            [=](Check& check) { check_not_finite(check, small_dtype, multiprocessors); }});
    list.push_back({"NaN dropped", check_dropped_nan});
    list.push_back({"large small", [](Check& check) { check_range(check, 1e30); }});
    list.push_back({"tiny small", [](Check& check) { check_range(check, 1e-30); }});
    return list;
}

}  // namespace

int main(int argc, char** argv) { return driver::run(argc, argv, cases()); }
