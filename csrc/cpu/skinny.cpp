// The forward for a few rows (decoding): y = x W' scale + s S B' + bias with W read once, along its rows.
//
// At M = 1 the time is that of reading W: an int8 weight is read as int8 and widened in registers; nothing is packed.
// Threads share out the rows of W. Each element of y is one sum over lanes, in an order that does not depend on them.
#include "rows.hpp"

#include "../core/workspace.hpp"
#include "kernels.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {
namespace {

constexpr std::int64_t rows_at_once = 4;       // rows of x that share a widened W
constexpr std::int64_t cols_at_once = 8;       // rows of W that one task turns into columns of y
constexpr std::int64_t prefetch_bytes = 2048;  // of W, ahead of the multiply-adds
constexpr std::int64_t serial_work = 1 << 16;  // multiply-adds below which a team costs more than it saves

// sums[i, j] = x[i, :] weight[n + j, :]' for R rows of x and C rows of W.
template <DType dtype, int R, int C>
void dot(const float* x, std::int64_t K, const Operand& weight, std::int64_t n, float* sums) {
    Floats acc[R][C] = {};
    const auto add = [&](auto load_x, auto load_w) __attribute__((always_inline)) {
        Floats w[C];
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) w[j] = load_w((n + j) * weight.row_stride);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const Floats v = load_x(i * K);
#pragma GCC unroll 8
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

// The same for one row of each: W is one stream through memory, four vectors of it at a time.
template <DType dtype>
void dot_one(const float* x, std::int64_t K, const Operand& weight, std::int64_t n, float* sums) {
    constexpr int parts = 4;
    Floats acc[parts] = {};
    const std::int64_t row = n * weight.row_stride;
    std::int64_t k = 0;
    for (; k + parts * width <= K; k += parts * width) {
        // Rows lie one after another: past the end of this one comes the next.
        __builtin_prefetch(static_cast<const char*>(weight.data) + (row + k) * size_of(dtype) + prefetch_bytes);
#pragma GCC unroll 8
        for (int part = 0; part < parts; ++part)
            acc[part] += load<Floats>(x + k + part * width) * load_floats<dtype>(weight.data, row + k + part * width);
    }
    for (; k + width <= K; k += width) acc[0] += load<Floats>(x + k) * load_floats<dtype>(weight.data, row + k);
    if (k < K) acc[1] += load_tail<DType::f32>(x, k, K - k) * load_tail<dtype>(weight.data, row + k, K - k);
    *sums = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// Eight sums are carried at once, as many as hide the latency of a multiply-add on two units.
struct Dot {
    void (*run)(const float* x, std::int64_t K, const Operand& weight, std::int64_t n, float* sums);
    std::int64_t rows, cols;
};

template <DType dtype>
Dot pick_dot(std::int64_t rows, std::int64_t cols) {
    if (rows >= 4) return cols >= 2 ? Dot{dot<dtype, 4, 2>, 4, 2} : Dot{dot<dtype, 4, 1>, 4, 1};
    if (rows >= 2) return cols >= 4 ? Dot{dot<dtype, 2, 4>, 2, 4} : Dot{dot<dtype, 2, 1>, 2, 1};
    return {dot_one<dtype>, 1, 1};
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

// Scale, low-rank term and bias of y[m, n .. n + cols), then the store.
void finish(const Skinny& layer, std::int64_t m, std::int64_t n, std::int64_t cols, float* y) {
    const float* S = layer.S + m * layer.rank;
    for (std::int64_t j = 0; j < cols; ++j) {
        if (layer.col_scale) y[j] *= layer.col_scale[n + j];
        float low = 0.0f;
        for (std::int64_t q = 0; q < layer.rank; ++q)
            low += S[q] * element(layer.B.data, layer.B.dtype, (n + j) * layer.B.row_stride + q);
        y[j] += layer.scaling * low;
        if (layer.bias) y[j] += element(layer.bias, layer.bias_dtype, n + j);
    }
    narrow(y, layer.out, layer.out_dtype, m * layer.out_stride + n, cols);
}

// y[:, n .. n + cols)
void columns(const Skinny& layer, const float* x, std::int64_t n, std::int64_t cols) {
    for (std::int64_t m = 0; m < layer.rows;) {
        float sums[rows_at_once * cols_at_once];
        std::int64_t rows = 0;
        for (std::int64_t j = 0; j < cols;) {
            const Dot dot = pick_dot(layer.weight.dtype, layer.rows - m, cols - j);
            dot.run(x + m * layer.depth, layer.depth, layer.weight, n + j, sums + j);
            rows = dot.rows;
            j += dot.cols;
        }
        for (std::int64_t i = 0; i < rows; ++i) finish(layer, m + i, n, cols, sums + i * cols_at_once);
        m += rows;
    }
}

}  // namespace

void skinny(const Skinny& layer) {
    if (layer.rows == 0 || layer.cols == 0) return;
    float* x = workspace(layer.rows * layer.depth);
    for (std::int64_t m = 0; m < layer.rows; ++m) {
        float* row = x + m * layer.depth;
        widen(layer.x.data, layer.x.dtype, m * layer.x.row_stride, layer.depth, row);
        if (layer.x.depth_scale)
            for (std::int64_t k = 0; k < layer.depth; ++k) row[k] *= layer.x.depth_scale[k];
        if (layer.x.dropout) drop(*layer.x.dropout, m, 0, layer.depth, row);
    }
    const std::int64_t groups = (layer.cols + cols_at_once - 1) / cols_at_once;
    const int team = layer.rows * layer.cols * layer.depth < serial_work ? 1 : layer.threads;
    const auto run = [&](std::int64_t group) {
        const std::int64_t n = group * cols_at_once, rest = layer.cols - n;
        columns(layer, x, n, rest < cols_at_once ? rest : cols_at_once);
    };
    // Entering a parallel region costs more than a small product, even with a team of one.
    if (team == 1) {
        for (std::int64_t group = 0; group < groups; ++group) run(group);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(team)
    for (std::int64_t group = 0; group < groups; ++group) run(group);
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
