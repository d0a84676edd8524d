// LoHa's factors as those of a LoRA of rank r1 r2. Shapes as in pyadapt/ops/loha.py: w1a (N, r1), w1b (r1, K), w2a
// (N, r2), w2b (r2, K), A (r1 r2, K), B (N, r1 r2).
#pragma once

#include "../core/tensor.hpp"

namespace pyadapt::cpu {

// The factors, dense fp32, and the factors (N) fp32 of B's rows beside the scaling, or null.
struct LohaFactors {
    const Tensor *w1a, *w1b, *w2a, *w2b, *rows;
    double scaling;
};

// A and B: dense, of one floating dtype.
void khatri_rao(const LohaFactors& factors, const Tensor& A, const Tensor& B, int threads);
// The gradients of the four, as these, from those of A and B.
void khatri_rao_backward(const Tensor& dA, const Tensor& dB, const LohaFactors& factors, const Tensor& dw1a,
                         const Tensor& dw1b, const Tensor& dw2a, const Tensor& dw2b, int threads);

}  // namespace pyadapt::cpu
