// The passes of an IA3 layer over its activations, beside the products of layer.hpp.
#pragma once

#include "../core/tensor.hpp"

namespace pyadapt::cpu {

// out = a scale + shift and dot[n] = sum over m of a[m, n] b[m, n]: a, b and out (M, N) floating, the rest (N,) fp32.
// Each of scale, shift and out may be null, b and dot both; out may be a.
void scale_columns(const Tensor& a, const Tensor* scale, const Tensor* shift, const Tensor* b, const Tensor* out,
                   const Tensor* dot, int threads);
// dot / divisor; true where some |divisor| is below `least`, so that its quotient is no use.
bool divide_dots(const Tensor& dot, const Tensor& divisor, double least);

}  // namespace pyadapt::cpu
