// The forward for a few rows (decoding): y = x W' scale + s S B' + bias with W read once, along its rows.
//
// At M = 1 the time is that of reading W, so an int8 weight is read as int8 and widened in registers; nothing is packed.
// Threads share out the rows of W. Each element of y is one sum over lanes, in an order that does not depend on them.
#include "rows.hpp"

#include "../core/workspace.hpp"
#include "kernels.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {
namespace {

constexpr std::int64_t cols_at_once = 4;       // rows of W whose sums are carried together
constexpr std::int64_t serial_work = 1 << 16;  // multiply-adds below which a team costs more than it saves

// sums[i, j] = x[i, :] weight[n + j, :]' for R rows of x and C rows of W.
template <DType dtype, int R, int C>
void dot(const float* x, std::int64_t K, const Operand& weight, std::int64_t n, float* sums) {
    Floats acc[R][C] = {};
    const auto add = [&](auto load_x, auto load_w) __attribute__((always_inline)) {
        Floats w[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) w[j] = load_w((n + j) * weight.row_stride);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
            const Floats v = load_x(i * K);
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) acc[i][j] += v * w[j];
        }
    };
    std::int64_t k = 0;
    for (; k + width <= K; k += width)
        add([&](std::int64_t at) __attribute__((always_inline)) { return load<Floats>(x + at + k); },
            [&](std::int64_t at) __attribute__((always_inline)) { return load_floats<dtype>(weight.data, at + k); });
    if (k < K)
        add([&](std::int64_t at) __attribute__((always_inline)) { return load_tail<DType::f32>(x, at + k, K - k); },
            [&](std::int64_t at) __attribute__((always_inline)) { return load_tail<dtype>(weight.data, at + k, K - k); });
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) sums[i * cols_at_once + j] = sum(acc[i][j]);
}

typedef void (*Dot)(const float* x, std::int64_t K, const Operand& weight, std::int64_t n, float* sums);

template <DType dtype>
Dot pick_dot(std::int64_t rows, std::int64_t cols) {
    if (cols < cols_at_once) return rows >= 2 ? dot<dtype, 2, 1> : dot<dtype, 1, 1>;
    return rows >= 2 ? dot<dtype, 2, 4> : dot<dtype, 1, 4>;
}

Dot pick_dot(DType dtype, std::int64_t rows, std::int64_t cols) {
    switch (dtype) {
        case DType::bf16: return pick_dot<DType::bf16>(rows, cols);
        case DType::f16: return pick_dot<DType::f16>(rows, cols);
        case DType::i8: return pick_dot<DType::i8>(rows, cols);
        default: return pick_dot<DType::f32>(rows, cols);
    }
}

float element(const void* data, DType dtype, std::int64_t at) {
    float value;
    widen(data, dtype, at, 1, &value);
    return value;
}

// y[:, n .. n + cols)
void columns(const Skinny& layer, const float* x, std::int64_t n, std::int64_t cols) {
    for (std::int64_t m = 0; m < layer.rows; m += 2) {
        const std::int64_t rows = layer.rows - m < 2 ? layer.rows - m : 2;
        float sums[2 * cols_at_once];
        const Dot run = pick_dot(layer.weight.dtype, rows, cols);
        for (std::int64_t j = 0; j < cols; j += cols == cols_at_once ? cols_at_once : 1)
            run(x + m * layer.depth, layer.depth, layer.weight, n + j, sums + j);
        for (std::int64_t i = 0; i < rows; ++i) {
            float* y = sums + i * cols_at_once;
            const float* S = layer.S + (m + i) * layer.rank;
            for (std::int64_t j = 0; j < cols; ++j) {
                if (layer.col_scale) y[j] *= layer.col_scale[n + j];
                float low = 0.0f;
                for (std::int64_t q = 0; q < layer.rank; ++q)
                    low += S[q] * element(layer.B.data, layer.B.dtype, (n + j) * layer.B.row_stride + q);
                y[j] += layer.scaling * low;
                if (layer.bias) y[j] += element(layer.bias, layer.bias_dtype, n + j);
            }
            narrow(y, layer.out, layer.out_dtype, (m + i) * layer.out_stride + n, cols);
        }
    }
}

}  // namespace

void skinny(const Skinny& layer) {
    if (layer.rows == 0 || layer.cols == 0) return;
    float* x = workspace(layer.rows * layer.depth);
    for (std::int64_t m = 0; m < layer.rows; ++m) {
        float* row = x + m * layer.depth;
        widen(layer.x.data, layer.x.dtype, m * layer.x.row_stride, layer.depth, row);
        if (layer.x.dropout) drop(*layer.x.dropout, m, 0, layer.depth, row);
    }
    const std::int64_t groups = (layer.cols + cols_at_once - 1) / cols_at_once;
    const int team = layer.rows * layer.cols * layer.depth < serial_work ? 1 : layer.threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t n = group * cols_at_once, rest = layer.cols - n;
        columns(layer, x, n, rest < cols_at_once ? rest : cols_at_once);
    }
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
