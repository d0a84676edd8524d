// skinny.cu: the forward of few rows against sums in double precision.
#include <array>

#include "support.hpp"

namespace {

using namespace driver;
using pyadapt::cuda::Gemm;
using pyadapt::cuda::Launch;
using pyadapt::cuda::Matrix;

// Of fp32: what a sum of products may be off, over the sum of their magnitudes. What is stored is rounded as well.
constexpr double sum_error = 0x1p-20;

struct Problem {
    int M, N, K;
    DType dtype = DType::f16;
    DType weight = DType::i8;  // of W
    int rank = 0;
    int multiprocessors = 1;   // with more than blocks of rows, the depth is cut into slices
    int slices = 0;            // where it matters to a case; the workspace shows it
    int left_gap = 0, left_shift = 0;    // elements between rows; elements between an aligned address and the first
    int right_gap = 0, right_shift = 0;
    int out_gap = 0, out_shift = 0;
    bool scaled = true, biased = true;   // column_scale, bias
    DType low_dtype = DType::f32;        // of B
    bool low_transposed = false;

    std::int64_t left_stride() const { return K + left_gap; }
    std::int64_t right_stride() const { return K + right_gap; }
    std::int64_t out_stride() const { return N + out_gap; }
    std::int64_t low_row_stride() const { return low_transposed ? 1 : rank + 3; }
    std::int64_t low_column_stride() const { return low_transposed ? N + 3 : 1; }
    std::string name() const {
        const auto layout = [](const char* what, int gap, int shift) {
            return gap || shift ? std::string(what) + std::to_string(gap) + "/" + std::to_string(shift) : std::string();
        };
        return std::to_string(M) + "x" + std::to_string(N) + "x" + std::to_string(K) + " rank " + std::to_string(rank) +
               " " + pyadapt::name_of(dtype) + " " + pyadapt::name_of(weight) + " " + std::to_string(multiprocessors) +
               layout(" x ", left_gap, left_shift) + layout(" W ", right_gap, right_shift) +
               layout(" out ", out_gap, out_shift) + (scaled ? "" : " unscaled") + (biased ? "" : " unbiased") +
               (low_dtype != DType::f32 ? std::string(" B ") + pyadapt::name_of(low_dtype) : "") +
               (low_transposed ? " transposed" : "");
    }
};

std::int64_t count_of(int rows, int columns, std::int64_t stride) {
    return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns;
}

struct Operands {
    Array x, W, scale, bias, S, B;
};

Operands random_operands(const Problem& problem) {
    Random random(31);
    const auto& [M, N, K] = std::array{problem.M, problem.N, problem.K};
    const std::int64_t low_count =
        problem.rank ? (N - 1) * problem.low_row_stride() + (problem.rank - 1) * problem.low_column_stride() + 1 : 0;
    Operands operands = {
        Array::random(problem.dtype, count_of(M, K, problem.left_stride()), random, problem.left_shift),
        Array::random(problem.weight, count_of(N, K, problem.right_stride()), random, problem.right_shift),
        Array::random(DType::f32, N, random, 1, 0.005, 0.02),
        Array::random(problem.dtype, N, random, 1),
        Array::random(DType::f32, std::int64_t{M} * problem.rank, random, 1),
        Array::random(problem.low_dtype, low_count, random, 1)};
    if (problem.weight == DType::i8)
        for (std::int64_t i = 0; i < operands.W.count(); i += 7) operands.W.set(i, i % 2 ? -128 : 127);
    return operands;
}

void check_skinny(Check& check, const Problem& problem, const Operands& operands) {
    const auto& [x, W, scale, bias, S, B] = operands;
    const int M = problem.M, N = problem.N, K = problem.K;
    Array out(problem.dtype, count_of(M, N, problem.out_stride()), problem.out_shift);
    Gemm product = {};
    product.M = M;
    product.N = N;
    product.K = K;
    product.dtype = problem.dtype;
    product.right_dtype = problem.weight;
    product.rank = problem.rank;
    const Launch launch = launch_settings(problem.multiprocessors);
    // The layer asks for the workspace before it has the operands.
    const Memory workspace(skinny_workspace(product, launch));
    const auto slice_bytes = static_cast<std::size_t>(M) * N * sizeof(float);
    if (problem.slices)
        check.require(workspace.bytes() == (problem.slices > 1) * problem.slices * slice_bytes,
                      "another number of slices than this case is for");
    product.left = x.data();
    product.left_stride = problem.left_stride();
    product.right = W.data();
    product.right_stride = problem.right_stride();
    product.alpha = 1.0f;
    product.column_scale = problem.scaled ? scale.as<float>() : nullptr;
    product.bias = problem.biased ? bias.data() : nullptr;
    product.bias_dtype = bias.dtype();
    product.low_left = S.as<float>();
    product.low_right = Matrix{B.data(), problem.low_dtype, problem.low_row_stride(), problem.low_column_stride()};
    product.low_scale = 1.5f;
    product.dropout = dropout_of(0, 0);
    product.out = out.data();
    product.out_stride = problem.out_stride();
    check.succeeded(skinny(product, workspace.data(), launch));

    for (int m = 0; m < M; ++m)
        for (int n = 0; n < problem.out_stride(); ++n) {
            const std::int64_t at = m * problem.out_stride() + n;
            if (n >= N) {
                if (at < out.count()) check(out.get(at), NAN, 0, "gap", at);
                continue;
            }
            double sum = 0, magnitude = 0;
            for (int k = 0; k < K; ++k) {
                const double term = x.get(m * problem.left_stride() + k) * W.get(n * problem.right_stride() + k);
                sum += term;
                magnitude += std::fabs(term);
            }
            if (problem.scaled) sum *= scale.get(n), magnitude *= scale.get(n);
            for (int q = 0; q < problem.rank; ++q) {
                const double low = B.get(n * problem.low_row_stride() + q * problem.low_column_stride());
                const double term = product.low_scale * S.get(std::int64_t{m} * problem.rank + q) * low;
                sum += term;
                magnitude += std::fabs(term);
            }
            if (problem.biased) sum += bias.get(n), magnitude += std::fabs(bias.get(n));
            const double tolerance =
                std::isfinite(magnitude) ? magnitude * sum_error + std::fabs(sum) * epsilon_of(problem.dtype) : 0;
            check(out.get(at), sum, tolerance, "out", at);
        }
}

std::vector<Problem> problems() {
    std::vector<Problem> list;
    for (DType dtype : half_dtypes())
        for (DType weight : {DType::i8, dtype}) {
            const auto add = [&](int M, int N, int K, auto change) {
                Problem problem = {M, N, K, dtype, weight};
                change(problem);
                list.push_back(problem);
            };
            add(1, 40, 1072, [](Problem& p) { p.rank = 3; });
            add(5, 33, 96, [](Problem& p) { p.rank = 16, p.out_gap = 5, p.out_shift = 1; });
            add(8, 32, 2100, [](Problem& p) { p.rank = 1, p.left_gap = 4, p.right_gap = 12; });
            add(12, 70, 528, [](Problem& p) { p.scaled = false, p.rank = 35, p.low_transposed = true; });
            add(16, 20, 1090, [](Problem& p) { p.biased = false, p.multiprocessors = 132, p.slices = 3; });
            add(19, 130, 528, [](Problem& p) { p.rank = 20; });
            add(32, 64, 45, [](Problem& p) { p.right_shift = 1; });
            add(64, 140, 272, [&](Problem& p) { p.rank = 16, p.low_dtype = dtype; });
            add(41, 21, 1040, [](Problem& p) { p.rank = 70, p.multiprocessors = 132, p.slices = 2; });
            add(3, 35, 1031, [](Problem& p) { p.rank = 9, p.multiprocessors = 6, p.slices = 2, p.left_shift = 3; });
        }
    list.push_back({0, 32, 64});
    list.push_back({3, 0, 64});
    Problem no_depth = {3, 40, 0};
    no_depth.rank = 5;
    list.push_back(no_depth);
    return list;
}

// Several rounds of everything.
std::vector<Problem> large_problems() {
    Problem deep = {1, 96, 4096 + 512, DType::f16, DType::i8, 16, 8, 2};
    Problem wide = {64, 512, 1024, has_bf16 ? DType::bf16 : DType::f16, DType::i8, 16, 8, 2};
    return {deep, wide};
}

// Infinities and NaN reach the elements that they belong to, and no others.
void check_not_finite(Check& check, int M, DType weight, int multiprocessors) {
    Problem problem = {M, 70, 1100, DType::f16, weight, 5, multiprocessors};
    Operands operands = random_operands(problem);
    operands.x.set((M - 1) * problem.left_stride() + 900, INFINITY);
    operands.S.set(0, NAN);
    operands.B.set(33 * problem.low_row_stride() + 2, INFINITY);
    if (weight != DType::i8) operands.W.set(69 * problem.right_stride() + 1099, NAN);
    operands.scale.set(5, NAN);
    check_skinny(check, problem, operands);
}

// Sums far outside fp16 that the scale brings back.
void check_range(Check& check) {
    Problem problem = {4, 32, 600};
    Operands operands = random_operands(problem);
    for (std::int64_t i = 0; i < operands.x.count(); ++i) operands.x.set(i, i % 3 ? 60000 : -30000);
    for (std::int64_t i = 0; i < operands.scale.count(); ++i) operands.scale.set(i, 1e-6);
    check_skinny(check, problem, operands);
}

std::vector<Case> cases() {
    std::vector<Case> list;
    for (const Problem& problem : problems())
        list.push_back({problem.name(), [=](Check& check) { check_skinny(check, problem, random_operands(problem)); }});
    for (const Problem& problem : large_problems())
        list.push_back({problem.name(), [=](Check& check) { check_skinny(check, problem, random_operands(problem)); },
                        Size::large});
    for (int M : {3, 33})
        for (DType weight : {DType::i8, DType::f16})
            for (int multiprocessors : {1, 132})
                list.push_back({"not finite " + std::to_string(M) + " " + pyadapt::name_of(weight) + " " +
                                    std::to_string(multiprocessors),
                                [=](Check& check) { check_not_finite(check, M, weight, multiprocessors); }});
    list.push_back({"sums beyond fp16", check_range});
    list.push_back({"too many rows", [](Check& check) {
                        Gemm product = {};
                        product.M = pyadapt::cuda::skinny_rows + 1;
                        product.N = 1;
                        product.dtype = DType::f16;
                        check.require(skinny(product, nullptr, launch_settings()) == cudaErrorInvalidValue,
                                      "more rows than the kernel takes were taken");
                    }});
    return list;
}

}  // namespace

int main(int argc, char** argv) { return driver::run(argc, argv, cases()); }
