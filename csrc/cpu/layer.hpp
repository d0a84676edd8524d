// A frozen linear layer with and without LoRA, as products of the engine. Shapes as in pyadapt/ops/lora.py:
// x (M, K), weight (N, K), weight_scale and bias (N,), A (r, K), B (N, r), S and dS (M, r), g (M, N).
//
// The passes are offered whole (the fused route) and one by one (beside a library's GEMM).
#pragma once

#include "../core/philox.hpp"
#include "../core/weight.hpp"

namespace pyadapt::cpu {

struct Adapter {
    const Tensor* A;
    const Tensor* B;
    double scaling;
    Dropout dropout;
};

// y = (x input_scale) W' scale + bias; the input's scale (K,) may be null, and a W of any dtype may have one here
void linear_forward(const Tensor& x, const Weight& weight, const Tensor& y, bool skinny, int threads,
                    const Tensor* input_scale = nullptr);
// dx = (g scale) W
void linear_dx(const Tensor& g, const Weight& weight, const Tensor& dx, int threads);

// S = drop(x) A', y = x W' scale + bias + s S B'
void lora_forward(const Tensor& x, const Weight& weight, const Adapter& adapter, const Tensor& y, const Tensor& S,
                  bool skinny, int threads);
// dx = g W + mask(dS A), dA, dB; dx may be null
void lora_backward(const Tensor& g, const Tensor& x, const Weight& weight, const Adapter& adapter, const Tensor& S,
                   const Tensor* dx, const Tensor& dA, const Tensor& dB, int threads);

// S = drop(x) A', as exact as an output of that dtype asks for
void lora_shrink(const Tensor& x, const Adapter& adapter, const Tensor& S, DType out, int threads);
// y = y scale + bias + s S B', in place; of the weight only scale and bias are read
void lora_expand(const Tensor& S, const Adapter& adapter, const Weight& weight, const Tensor& y, int threads);
// dS = s g B, dB = s g' S, dA = dS' drop(x)
void lora_gradients(const Tensor& g, const Tensor& x, const Adapter& adapter, const Tensor& S, const Tensor& dS,
                    const Tensor& dA, const Tensor& dB, int threads);
// dA = dS' drop(x)
void lora_input_gradient(const Tensor& dS, const Tensor& x, const Adapter& adapter, const Tensor& dA, int threads);
// dx = dx + mask(dS A), in place
void lora_expand_dx(const Tensor& dS, const Adapter& adapter, const Tensor& dx, int threads);

}  // namespace pyadapt::cpu
