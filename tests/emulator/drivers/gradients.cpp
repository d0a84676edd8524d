// gradients.cu: the g pass and the dA pass against sums in double precision.
#include "support.hpp"

namespace {

using namespace driver;
using pyadapt::cuda::GradientPass;
using pyadapt::cuda::InputPass;
using pyadapt::cuda::Launch;
using pyadapt::cuda::Matrix;

// Of fp32: what a sum of products may be off, over the sum of their magnitudes.
constexpr double sum_error = 0x1p-21;

double tolerance_of(double want, double magnitude, DType dtype) {
    if (!std::isfinite(want)) return 0;
    const double rounding = dtype == DType::f32 ? 0 : epsilon_of(dtype);
    return magnitude * sum_error + std::fabs(want) * rounding;
}

// Fewer multiprocessors, fewer chunks: one makes a single chunk of rows out of all that is small.
struct Problem {
    int M, columns, rank;
    DType dtype = DType::f16;
    DType small_dtype = DType::f32;   // of B
    DType result_dtype = DType::f32;  // of dB and dA
    int multiprocessors = 132;
    int gap = 0;               // elements between rows of g or x
    int shift = 0;             // elements between an aligned address and the first of them
    bool transposed = false;   // B
    bool scaled = false;       // scaled_g is wanted
    double dropout = 0;
    bool device_seed = false;
    int expected_row_chunks = 0;  // where it matters to a case, seen in the size of the workspace

    std::int64_t stride() const { return columns + gap; }
    std::int64_t wide_count() const { return M == 0 || columns == 0 ? 0 : (M - 1) * stride() + columns; }
    std::string name(const char* pass) const {
        std::string text = std::string(pass) + " " + std::to_string(M) + "x" + std::to_string(columns) + " rank " +
                           std::to_string(rank) + " " + pyadapt::name_of(dtype) + " " + std::to_string(multiprocessors);
        if (small_dtype != DType::f32) text += std::string(" B ") + pyadapt::name_of(small_dtype);
        if (result_dtype != DType::f32) text += std::string(" result ") + pyadapt::name_of(result_dtype);
        if (gap) text += " gap " + std::to_string(gap);
        if (shift) text += " shift " + std::to_string(shift);
        if (transposed) text += " transposed";
        if (scaled) text += " scaled";
        if (dropout > 0) text += " dropout " + std::to_string(dropout) + (device_seed ? " device seed" : "");
        return text;
    }
};

// --- g pass ---

struct GradientOperands {
    Array g, B, S, g_scale;
};

GradientOperands random_gradient(const Problem& problem) {
    Random random(11);
    return {Array::random(problem.dtype, problem.wide_count(), random, problem.shift),
            Array::random(problem.small_dtype, std::int64_t{problem.columns} * problem.rank, random, 1),
            Array::random(DType::f32, std::int64_t{problem.M} * problem.rank, random, 1, -1e5, 1e5),
            Array::random(DType::f32, problem.columns, random, 1, 0.01, 0.02)};
}

void check_gradient(Check& check, const Problem& problem, const GradientOperands& operands) {
    const auto& [g, B, S, g_scale] = operands;
    const int M = problem.M, N = problem.columns, rank = problem.rank;
    const std::int64_t row_stride = problem.transposed ? 1 : rank, column_stride = problem.transposed ? N : 1;
    const float scaling = 1.75f, factor = 0x1p-3f;
    Array dS(DType::f32, std::int64_t{M} * rank), dB(problem.result_dtype, std::int64_t{N} * rank);
    Array scaled(problem.dtype, problem.scaled ? std::int64_t{M} * N : 0, problem.shift);
    GradientPass pass = {};
    pass.M = M;
    pass.N = N;
    pass.rank = rank;
    pass.dtype = problem.dtype;
    pass.g = g.data();
    pass.g_stride = problem.stride();
    pass.B = Matrix{B.data(), problem.small_dtype, row_stride, column_stride};
    pass.S = S.as<float>();
    pass.scaling = scaling;
    pass.dS = dS.as<float>();
    pass.dB = dB.data();
    pass.dB_dtype = problem.result_dtype;
    pass.g_factor = factor;
    if (problem.scaled) {
        pass.g_scale = g_scale.as<float>();
        pass.scaled_g = scaled.data();
    }
    const Launch launch = launch_settings(problem.multiprocessors);
    const Memory workspace(gradient_pass_workspace(pass, launch));
    pass.workspace = workspace.data();
    check.succeeded(gradient_pass(pass, launch));

    for (int m = 0; m < M; ++m)
        for (int j = 0; j < rank; ++j) {
            double sum = 0, magnitude = 0;
            for (int n = 0; n < N; ++n) {
                const double term = g.get(m * problem.stride() + n) * B.get(n * row_stride + j * column_stride);
                sum += term;
                magnitude += std::fabs(term);
            }
            check(dS.get(m * rank + j), sum * scaling, tolerance_of(sum, magnitude * scaling, DType::f32), "dS",
                  m * rank + j);
        }
    for (int n = 0; n < N; ++n)
        for (int j = 0; j < rank; ++j) {
            double sum = 0, magnitude = 0;
            for (int m = 0; m < M; ++m) {
                const double term = g.get(m * problem.stride() + n) * S.get(m * rank + j);
                sum += term;
                magnitude += std::fabs(term);
            }
            // fp16 ends before these sums do.
            const bool overflows = problem.result_dtype == DType::f16 && std::fabs(sum * scaling) > 65500;
            const double want = overflows ? std::copysign(INFINITY, sum) : sum * scaling;
            check(dB.get(n * rank + j), want, tolerance_of(want, magnitude * scaling, problem.result_dtype), "dB",
                  n * rank + j);
        }
    Array rounded(problem.dtype, 1);
    for (int m = 0; m < M && problem.scaled; ++m)
        for (int n = 0; n < N; ++n) {
            const auto value = static_cast<float>(g.get(m * problem.stride() + n));
            rounded.set(0, value * static_cast<float>(g_scale.get(n)) * factor);
            check(scaled.get(std::int64_t{m} * N + n), rounded.get(0), 0, "scaled_g", std::int64_t{m} * N + n);
        }
}

// --- dA pass ---

struct InputOperands {
    Array x, dS;
};

InputOperands random_input(const Problem& problem) {
    Random random(12);
    return {Array::random(problem.dtype, problem.wide_count(), random, problem.shift),
            Array::random(DType::f32, std::int64_t{problem.M} * problem.rank, random, 1, -1e-6, 1e-6)};
}

void check_input(Check& check, const Problem& problem, const InputOperands& operands) {
    const auto& [x, dS] = operands;
    const int M = problem.M, K = problem.columns, rank = problem.rank;
    Array seed(DType::i64, 1), dA(problem.result_dtype, std::int64_t{rank} * K);
    InputPass pass = {};
    pass.M = M;
    pass.K = K;
    pass.rank = rank;
    pass.dtype = problem.dtype;
    pass.x = x.data();
    pass.x_stride = problem.stride();
    pass.dS = dS.as<float>();
    pass.dropout = dropout_of(problem.dropout, 0x1234567890abcdefull, problem.device_seed ? &seed : nullptr);
    pass.dA = dA.data();
    pass.dA_dtype = problem.result_dtype;
    const Launch launch = launch_settings(problem.multiprocessors);
    const Memory workspace(input_pass_workspace(pass, launch));
    const auto chunk_bytes = static_cast<std::size_t>(rank) * K * sizeof(float);
    if (problem.expected_row_chunks)
        check.require(workspace.bytes() == problem.expected_row_chunks * chunk_bytes,
                      "another number of row chunks than this case is for");
    pass.workspace = workspace.data();
    check.succeeded(input_pass(pass, launch));

    std::vector<double> dropped(static_cast<std::size_t>(M) * K);
    for (int m = 0; m < M; ++m)
        for (int k = 0; k < K; ++k)
            dropped[std::size_t(m) * K + k] = keeps(pass.dropout, m, k) ? x.get(m * problem.stride() + k) : 0.0;
    for (int j = 0; j < rank; ++j)
        for (int k = 0; k < K; ++k) {
            double sum = 0, magnitude = 0;
            for (int m = 0; m < M; ++m) {
                const double term = dropped[std::size_t(m) * K + k] * dS.get(m * rank + j);
                sum += term;
                magnitude += std::fabs(term);
            }
            // Sums below the smallest normal numbers of fp16 are rounded to its steps.
            const double step = problem.result_dtype == DType::f16 ? 0x1p-25 : 0;
            const double scale = pass.dropout.scale;
            check(dA.get(std::int64_t{j} * K + k), sum * scale,
                  tolerance_of(sum, magnitude * scale, problem.result_dtype) + step, "dA", std::int64_t{j} * K + k);
        }
}

// --- cases ---

Problem with_dropout(Problem problem, double dropout, bool device_seed = false) {
    problem.dropout = dropout;
    problem.device_seed = device_seed;
    return problem;
}

// Shapes that both passes see. A chunk has 512 columns up to rank 16 and 256 beyond, and 32 rows or more.
std::vector<Problem> problems() {
    std::vector<Problem> list;
    const DType other = has_bf16 ? DType::bf16 : DType::f16;
    for (DType dtype : half_dtypes()) {
        list.push_back({37, 45, 3, dtype});
        list.push_back({16, 512, 16, dtype});
        list.push_back({70, 530, 16, dtype});
        list.push_back({70, 264, 40, dtype, DType::f32, dtype});
    }
    list.push_back({1, 1, 1});
    list.push_back({50, 600, 1, other, other});
    list.push_back({33, 72, 16, DType::f16, DType::f16, DType::f16, 1});
    list.push_back({100, 40, 8, other, DType::f32, other, 1});
    list.push_back({45, 100, 70, other, other, DType::f32, 1});
    list.push_back({40, 96, 16, other, DType::f32, DType::f32, 132, 8});
    list.push_back({40, 97, 5, DType::f16, DType::f32, DType::f32, 132, 3, 8});
    list.push_back({40, 96, 5, other, DType::f32, DType::f32, 132, 0, 1});
    // Nothing to sum, or nothing to write.
    list.push_back({0, 40, 5});
    list.push_back({40, 0, 5, DType::f16, DType::f32, DType::f16});
    list.push_back({40, 40, 0});
    list.push_back({0, 0, 4});
    return list;
}

std::vector<Case> cases() {
    std::vector<Case> list;
    const DType other = has_bf16 ? DType::bf16 : DType::f16;
    const auto add_gradient = [&](const Problem& problem, Size size = Size::small) {
        list.push_back({problem.name("g pass"),
                        [=](Check& check) { check_gradient(check, problem, random_gradient(problem)); }, size});
    };
    const auto add_input = [&](const Problem& problem, Size size = Size::small) {
        list.push_back(
            {problem.name("dA pass"), [=](Check& check) { check_input(check, problem, random_input(problem)); }, size});
    };

    for (Problem problem : problems()) {
        add_gradient(problem);
        add_input(problem);
    }
    add_gradient({50, 70, 6, DType::f16, DType::f32, DType::f32, 132, 0, 0, true});
    add_gradient({50, 520, 6, other, DType::f32, DType::f32, 132, 0, 0, false, true});
    add_gradient({20, 77, 40, DType::f16, DType::f32, DType::f32, 132, 0, 0, false, true});
    add_gradient({20, 80, 5, DType::f16, DType::f32, DType::f32, 132, 0, 3, false, true});
    add_gradient({20, 80, 0, DType::f16, DType::f32, DType::f32, 132, 0, 0, false, true});
    add_gradient({260, 1100, 16, other}, Size::large);

    for (double dropout : {0.3, 1.0}) {
        add_input(with_dropout({40, 530, 16, other}, dropout));
        add_input(with_dropout({70, 77, 40, DType::f16}, dropout));
        add_input(with_dropout({37, 50, 3, DType::f16, DType::f32, DType::f32, 132, 3, 1}, dropout, true));
    }
    add_input(with_dropout({300, 600, 16, other}, 0.3), Size::large);
    Problem one_chunk = {100, 40, 4}, chunks = {100, 40, 4}, tall = {2100, 8, 4};
    one_chunk.multiprocessors = tall.multiprocessors = 1;
    one_chunk.expected_row_chunks = 2;  // two blocks fit on a multiprocessor
    chunks.expected_row_chunks = 4;
    tall.expected_row_chunks = 4;  // two waves of two blocks: a chunk has at most 1024 rows
    add_input(one_chunk);
    add_input(chunks);
    add_input(tall, Size::large);

    list.push_back({"g pass NaN and Inf", [=](Check& check) {
                        const Problem problem = {40, 60, 5};
                        GradientOperands operands = random_gradient(problem);
                        operands.g.set(3 * 60 + 7, NAN);
                        operands.g.set(9 * 60 + 20, INFINITY);
                        operands.g.set(17 * 60 + 21, -INFINITY);
                        operands.B.set(20 * 5 + 1, 0);      // times the infinity: NaN
                        operands.B.set(20 * 5 + 2, 1);      // exact in tf32
                        operands.B.set(21 * 5 + 3, -1.0001);
                        operands.B.set(33 * 5 + 4, INFINITY);
                        operands.S.set(25 * 5 + 0, -INFINITY);
                        operands.S.set(9 * 5 + 3, 0.5);
                        check_gradient(check, problem, operands);
                    }});
    list.push_back({"dA pass drops NaN and Inf", [=](Check& check) {
                        const Problem problem = with_dropout({40, 64, 5, other}, 0.5);
                        InputOperands operands = random_input(problem);
                        for (int k = 0; k < 64; ++k) operands.x.set(11 * 64 + k, k % 2 ? INFINITY : NAN);
                        check_input(check, problem, operands);
                    }});
    list.push_back({"bf16 below sm_80 is refused", [](Check& check) {
                        GradientPass g = {};
                        InputPass x = {};
                        g.dtype = x.dtype = DType::bf16;
                        g.M = x.M = g.N = x.K = g.rank = x.rank = 4;
                        const Launch launch = {nullptr, 75, 4};
                        check.require(gradient_pass(g, launch) == cudaErrorNotSupported, "the g pass took bf16");
                        check.require(input_pass(x, launch) == cudaErrorNotSupported, "the dA pass took bf16");
                    }});
    return list;
}

}  // namespace

int main(int argc, char** argv) { return driver::run(argc, argv, cases()); }
