// What a CPU kernel is asked to do, and the table of kernels that each instruction set fills in.
//
// Only plain structures live here: this header is seen by files compiled for different instruction sets, and an inline
// function in it could be kept in the copy that this machine cannot run.
#pragma once

#include <cstdint>

#include "../core/dtype.hpp"
#include "../core/philox.hpp"

namespace pyadapt::cpu {

// One side of a product, seen as (rows, depth): depth is the axis that is summed over.
struct Operand {
    const void* data = nullptr;
    DType dtype = DType::f32;
    std::int64_t row_stride = 0;
    std::int64_t depth_stride = 0;
    bool along_depth = true;             // which of the two strides is 1: memory is read along that axis
    const float* depth_scale = nullptr;  // multiplies element (i, p) by depth_scale[p]: g scale[n] in dx
    const Dropout* dropout = nullptr;    // drop(x): the axis of unit stride is k, the other m
    float alpha = 1.0f;                  // multiplies every element
};

// out (rows, cols) = left (rows, depth) right (cols, depth)', with a low-rank term in the same tile.
//
//   forward:  out = alpha (left right') col_scale + low_left low_right' + bias
//   dx:       out = drop(low_left low_right') + left right'
struct Gemm {
    std::int64_t rows = 0, cols = 0, depth = 0;
    Operand left, right;
    bool add_out = false;  // the product is already in out (the library route): read it there, depth is 0

    std::int64_t rank = 0;  // 0: no low-rank term
    Operand low_left;       // (rows, rank)
    Operand low_right;      // (cols, rank)
    const Dropout* low_dropout = nullptr;  // the mask of dx; the low-rank term comes first then

    float alpha = 1.0f;                // multiplies the product
    bool rounds = false;               // a side of more bits may be rounded to bf16, beside one of that (sums in fp32)
    const float* col_scale = nullptr;  // the row scale of an int8 weight
    const void* bias = nullptr;
    DType bias_dtype = DType::f32;

    void* out = nullptr;
    DType out_dtype = DType::f32;
    std::int64_t out_stride = 0;
    int threads = 1;
};

// The same forward for a few rows: weights are read once, along their rows, and nothing is packed.
struct Skinny {
    std::int64_t rows = 0, cols = 0, depth = 0;  // M, N, K
    Operand x;                                   // (M, K), unit stride along K
    Operand weight;                              // (N, K), unit stride along K
    const float* col_scale = nullptr;
    const void* bias = nullptr;
    DType bias_dtype = DType::f32;
    std::int64_t rank = 0;
    const float* S = nullptr;  // (M, r), dense
    Operand B;                 // (N, r), unit stride along r
    float scaling = 0.0f;
    void* out = nullptr;
    DType out_dtype = DType::f32;
    std::int64_t out_stride = 0;
    int threads = 1;
};

// Row-wise int8: w[n, k] = q[n, k] scale[n].
struct QuantizeRows {
    std::int64_t rows = 0, cols = 0;
    const void* w = nullptr;
    DType w_dtype = DType::f32;
    std::int64_t w_stride = 0;
    std::int8_t* q = nullptr;
    std::int64_t q_stride = 0;
    float* scale = nullptr;  // a row that holds a NaN or Inf gets the scale NaN
    int threads = 1;
};

struct DequantizeRows {
    std::int64_t rows = 0, cols = 0;
    const std::int8_t* q = nullptr;
    std::int64_t q_stride = 0;
    const float* scale = nullptr;  // null: the integers themselves
    void* out = nullptr;
    DType out_dtype = DType::f32;
    std::int64_t out_stride = 0;
    int threads = 1;
};

// out = a scale + shift, dot[n] = sum over m of a[m, n] b[m, n].
struct Columns {
    std::int64_t rows = 0, cols = 0;
    const void* a = nullptr;
    DType a_dtype = DType::f32;
    std::int64_t a_stride = 0;
    const void* b = nullptr;  // null: no sums
    DType b_dtype = DType::f32;
    std::int64_t b_stride = 0;
    const float* scale = nullptr;  // null: ones
    const float* shift = nullptr;  // null: zeros
    void* out = nullptr;           // may be a; null: only the sums are wanted
    DType out_dtype = DType::f32;
    std::int64_t out_stride = 0;
    float* dot = nullptr;
    int threads = 1;
};

// A range of depth steps.
struct Steps {
    std::int64_t first, count;
};

// One of many small, independent products: rows [row, row + rows) of out = left right', summed over some ranges of the
// depth in their order. Rows, columns and steps are counted as the operands and the masks count them.
//
//   a segment's rows:   out = [out +] mask(alpha left right')          an adapter's sum:   out = alpha left right'
struct SegmentProduct {
    std::int64_t row = 0, rows = 0, cols = 0;
    const Steps* steps = nullptr;
    std::int64_t ranges = 0;  // of steps; none: the product is zero
    Operand left, right;
    float alpha = 1.0f;
    const Dropout* mask = nullptr;
    bool add_out = false;
    void* out = nullptr;
    DType out_dtype = DType::f32;
    std::int64_t out_stride = 0;
    std::int64_t first_task = 0;  // the kernel's own
};

// Products that do not depend on each other, but may read what the stage before them wrote.
struct SegmentStage {
    SegmentProduct* products;
    std::int64_t count;
};

// LoKr's term of a layer, tokens by rows: y += (scaling factors) * (x kron(w1, w2)'), w2 = up down, or down where up is
// null. Factors are dense fp32: w1 (a, c), down (h, d), up (b, h); x (M, c d), y and g (M, a b).
struct Kron {
    std::int64_t M = 0, a = 0, b = 0, c = 0, d = 0, h = 0;
    const float *w1 = nullptr, *down = nullptr, *up = nullptr;
    float scaling = 1.0f;
    const float* factors = nullptr;  // (a b): what dropping makes of each output feature; null for ones
    const void* x = nullptr;
    DType x_dtype = DType::f32;
    std::int64_t x_stride = 0;
    void* y = nullptr;  // forward, in place
    DType y_dtype = DType::f32;
    std::int64_t y_stride = 0;
    const void* g = nullptr;  // backward
    DType g_dtype = DType::f32;
    std::int64_t g_stride = 0;
    void* dx = nullptr;  // in place; null where nobody asks for it
    DType dx_dtype = DType::f32;
    std::int64_t dx_stride = 0;
    float *dw1 = nullptr, *d_down = nullptr, *d_up = nullptr;  // as w1, down and up
    int threads = 1;
};

// LoHa as a LoRA of rank r1 r2: A[(i, j), k] = w1b[i, k] w2b[j, k], B[n, (i, j)] = scaling factors[n] w1a[n, i] w2a[n, j].
// The factors are dense fp32: w1a (N, r1), w1b (r1, K), w2a (N, r2), w2b (r2, K); A (r1 r2, K) and B (N, r1 r2) dense.
struct KhatriRao {
    std::int64_t r1 = 0, r2 = 0, K = 0, N = 0;
    const float *w1a = nullptr, *w1b = nullptr, *w2a = nullptr, *w2b = nullptr;
    const float* factors = nullptr;  // (N); null for ones
    float scaling = 1.0f;
    void *A = nullptr, *B = nullptr;  // backward: their gradients, which are read
    DType dtype = DType::f32;
    float *dw1a = nullptr, *dw1b = nullptr, *dw2a = nullptr, *dw2b = nullptr;
    int threads = 1;
};

constexpr int most_products = 2;
constexpr int most_stages = 2;

struct Kernels {
    const char* isa;
    // Products that do not depend on each other share one team: at most most_products of them.
    void (*gemm)(const Gemm* products, int count);
    void (*skinny)(const Skinny&);
    void (*quantize_rows)(const QuantizeRows&);
    void (*dequantize_rows)(const DequantizeRows&);
    // Any number of products, in one team: at most most_stages stages of them.
    void (*segments)(const SegmentStage* stages, int count, int threads);
    void (*columns)(const Columns&);
    void (*kron_forward)(const Kron&);
    void (*kron_backward)(const Kron&);
    void (*khatri_rao)(const KhatriRao&);
    void (*khatri_rao_backward)(const KhatriRao&);
};

}  // namespace pyadapt::cpu
