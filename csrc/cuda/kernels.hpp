// The CUDA kernels as the host calls them: what each computes, its operands, the launch. Shapes and letters are those of
// pyadapt/ops/lora.py. Operands have been checked (layer.cpp); pointers are device memory; nothing here allocates, waits
// for the device or reads device memory on the host, so that all of it can be captured into a CUDA graph.
//
// Every function gives back the first CUDA error. All are deterministic: fixed orders of summation, no atomics.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../core/dtype.hpp"

namespace pyadapt::cuda {

// Where and how to launch.
struct Launch {
    cudaStream_t stream;
    int capability;       // 75, 80, 86, ...
    int multiprocessors;
};

// drop(x) of core/philox.hpp with the seed on the device or, where `seed` is null, in `key`. No dropout: threshold 0,
// scale 1.
struct DeviceDropout {
    const std::int64_t* seed;
    std::uint32_t key[2];
    std::uint64_t threshold;
    float scale;
};

// A small floating matrix with any strides, in elements.
struct Matrix {
    const void* data;
    DType dtype;
    std::int64_t row_stride, column_stride;
};

// gemm.cu: the frozen product with the low-rank term, kernels 1 and 2 (forward and dx).
//
//   out = alpha (left right') column_scale + mask(low_scale low_left low_right') + bias
//
// left (M, K) and out (M, N) are of `dtype`, fp16 or bf16; right (N, K) of the same or int8, with unit stride along K
// or along N. With K = 0 and add_out the product is what out already holds. The mask is made for (row, column) of out.
struct Gemm {
    int M, N, K;
    DType dtype;
    const void* left;
    std::int64_t left_stride;  // between rows; unit stride along K
    const void* right;
    DType right_dtype;
    std::int64_t right_stride;  // between rows n, or between depths k where right_along_columns
    bool right_along_columns;   // unit stride along N
    float alpha;
    const float* column_scale;  // (N,) or null
    const void* bias;           // (N,) or null
    DType bias_dtype;
    bool add_out;
    int rank;               // 0: no low-rank term
    const float* low_left;  // (M, rank), rows without gaps
    Matrix low_right;       // (N, rank)
    float low_scale;
    DeviceDropout dropout;
    void* out;
    std::int64_t out_stride;
};
cudaError_t gemm(const Gemm& product, const Launch& launch);

// shrink.cu: kernel 3, the S pass: out = alpha drop(x) small', with x read once.
//
// x (M, K) of `dtype`, small (rank, K), out (M, rank) fp32 without gaps. Sums as exact as fp32 ones.
struct Shrink {
    int M, K, rank;
    DType dtype;
    const void* x;
    std::int64_t x_stride;
    Matrix small;
    DeviceDropout dropout;
    float alpha;  // beside dropout.scale, which is multiplied in as well
    float* out;
    void* workspace;
};
std::size_t shrink_workspace(const Shrink& pass, const Launch& launch);  // bytes
cudaError_t shrink(const Shrink& pass, const Launch& launch);

// gradients.cu: kernel 4, the g pass: in one read of g
//
//   dS = scaling g B        dB = scaling g' S        scaled_g = g (g_scale per column) g_factor
//
// g (M, N) of `dtype`, B (N, rank), S (M, rank) and dS (M, rank) fp32 without gaps; dB (N, rank) without gaps, of
// dB_dtype; scaled_g (M, N) of `dtype` without gaps, or null.
struct GradientPass {
    int M, N, rank;
    DType dtype;
    const void* g;
    std::int64_t g_stride;
    Matrix B;
    const float* S;
    float scaling;
    float* dS;
    void* dB;
    DType dB_dtype;
    const float* g_scale;  // (N,), or null together with scaled_g
    float g_factor;
    void* scaled_g;
    void* workspace;
};
std::size_t gradient_pass_workspace(const GradientPass& pass, const Launch& launch);  // bytes
cudaError_t gradient_pass(const GradientPass& pass, const Launch& launch);

// gradients.cu: kernel 5, the dA pass: dA = dS' drop(x).
//
// x (M, K) of `dtype`, dS (M, rank) fp32 without gaps, dA (rank, K) without gaps, of dA_dtype.
struct InputPass {
    int M, K, rank;
    DType dtype;
    const void* x;
    std::int64_t x_stride;
    const float* dS;
    DeviceDropout dropout;
    void* dA;
    DType dA_dtype;
    void* workspace;
};
std::size_t input_pass_workspace(const InputPass& pass, const Launch& launch);  // bytes
cudaError_t input_pass(const InputPass& pass, const Launch& launch);

// skinny.cu: kernel 6, the forward of few rows: W is streamed once.
//
//   out = (x W') column_scale + low_scale low_left low_right' + bias      M <= skinny_rows
//
// Fields as in Gemm; right has unit stride along K, and there is no dropout (it is in low_left) and no add_out.
constexpr int skinny_rows = 64;
std::size_t skinny_workspace(const Gemm& product, const Launch& launch);  // bytes
cudaError_t skinny(const Gemm& product, void* workspace, const Launch& launch);

// quantize.cu: kernel 12, and the panels of kernel 7. Row strides in elements, unit stride along the columns.
//
// q = round to nearest even(w / scale), scale = max |w| / 127 of each row; NaN where the row holds a NaN or Inf.
struct Quantize {
    int rows, columns;
    const void* w;
    DType dtype;  // fp32, fp16 or bf16
    std::int64_t w_stride;
    std::int8_t* q;
    std::int64_t q_stride;
    float* scale;
};
cudaError_t quantize(const Quantize& pass, const Launch& launch);

// out = q scale factor, rounded once; without scale q factor.
struct Dequantize {
    int rows, columns;
    const std::int8_t* q;
    std::int64_t q_stride;
    const float* scale;  // (rows,) or null
    float factor;
    void* out;
    DType dtype;  // fp32, fp16 or bf16
    std::int64_t out_stride;
};
cudaError_t dequantize(const Dequantize& pass, const Launch& launch);

}  // namespace pyadapt::cuda
