// LoKr's term beside a frozen product that is made elsewhere. Shapes as in pyadapt/ops/lokr.py: x (M, c d), y and g
// (M, a b), w1 (a, c), down (h, d), up (b, h).
#pragma once

#include "../core/tensor.hpp"

namespace pyadapt::cpu {

// y += (scaling factors) * (x kron(w1, up down)'); without `up` the right factor is `down`, and h is b. The matrices
// are dense fp32; factors (a b) fp32, or null.
struct LokrTerm {
    const Tensor *w1, *down, *up, *factors;
    double scaling;
};

void lokr_forward(const Tensor& x, const LokrTerm& term, const Tensor& y, int threads);
// dx is added to, and may be null; d_up is null as `up` is.
void lokr_backward(const Tensor& g, const Tensor& x, const LokrTerm& term, const Tensor* dx, const Tensor& dw1,
                   const Tensor& d_down, const Tensor* d_up, int threads);

}  // namespace pyadapt::cpu
