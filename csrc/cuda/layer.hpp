// A frozen linear layer with and without LoRA on a CUDA device, composed of the kernels of kernels.hpp. Shapes as in
// pyadapt/ops/lora.py: x (M, K), weight (N, K), weight_scale and bias (N,), A (r, K), B (N, r), S and dS (M, r),
// g (M, N).
//
// x, y, g and dx have one 16-bit dtype, which W has too unless it is int8; A, B and bias may be fp32 or 16 bits. The
// scratch memory of a call is the caller's: *_workspace says how many bytes. A call without enough of it is an error.
#pragma once

#include <cstddef>

#include "../core/tensor.hpp"
#include "../core/weight.hpp"
#include "kernels.hpp"

namespace pyadapt::cuda {

struct Adapter {
    const Tensor* A;
    const Tensor* B;
    double scaling;
    DeviceDropout dropout;
};

// Device memory and where to launch.
struct Context {
    int device;
    Launch launch;
    const Tensor* workspace;
};

// Sizes of a layer, as far as the scratch memory depends on them.
struct LayerSizes {
    int M, N, K, rank;
    DType dtype;   // of x
    DType weight;
};

// y = x W' scale + bias; `skinny`: by the streaming kernel of a few rows
void linear_forward(const Tensor& x, const Weight& weight, const Tensor& y, bool skinny, const Context& context);
// dx = g W
void linear_dx(const Tensor& g, const Weight& weight, const Tensor& dx, const Context& context);

// S = drop(x) A', y = x W' scale + bias + s S B'
void lora_forward(const Tensor& x, const Weight& weight, const Adapter& adapter, const Tensor& y, const Tensor& S,
                  bool skinny, const Context& context);
// dx = g W + mask(dS A), dA, dB; dx may be null
void lora_backward(const Tensor& g, const Tensor& x, const Weight& weight, const Adapter& adapter, const Tensor& S,
                   const Tensor* dx, const Tensor& dA, const Tensor& dB, const Context& context);

std::size_t forward_workspace(const LayerSizes& sizes, bool skinny, const Launch& launch);
std::size_t backward_workspace(const LayerSizes& sizes, const Launch& launch);

// The low-rank passes one by one, beside a library's GEMM.
// S = drop(x) A'
void lora_shrink(const Tensor& x, const Adapter& adapter, const Tensor& S, const Context& context);
// y = y scale + bias + s S B', in place; of the weight only scale and bias are read
void lora_expand(const Tensor& S, const Adapter& adapter, const Weight& weight, const Tensor& y,
                 const Context& context);
// dS = s g B, dB = s g' S, dA = dS' drop(x), and scaled_g = g scale factor where it is not null
void lora_gradients(const Tensor& g, const Tensor& x, const Adapter& adapter, const Tensor& S, const Tensor& dS,
                    const Tensor& dA, const Tensor& dB, const Tensor* weight_scale, double factor,
                    const Tensor* scaled_g, const Context& context);
// dx = dx + mask(dS A), in place
void lora_expand_dx(const Tensor& dS, const Adapter& adapter, const Tensor& dx, const Context& context);

// The row scale of an int8 W goes into g for dx, for it lies on the axis that is summed. Times this power of two it is
// the largest weight of the row, about: so g keeps its magnitude in 16 bits, and dx takes the factor back.
constexpr float g_factor = 128.0f;

void quantize_rows(const Tensor& w, const Tensor& q, const Tensor& scale, const Context& context);
void dequantize_rows(const Tensor& q, const Tensor* scale, double factor, const Tensor& out, const Context& context);

}  // namespace pyadapt::cuda
