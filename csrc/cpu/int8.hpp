// Row-wise int8 weights: w (N, K), q (N, K) int8, scale (N,) float32.
#pragma once

#include "../core/tensor.hpp"

namespace pyadapt::cpu {

// A row that holds a NaN or an infinity gets the scale NaN and no q: the caller says which row it was.
void quantize_rows(const Tensor& w, const Tensor& q, const Tensor& scale, int threads);
// out = q scale; with no scale the integers themselves
void dequantize_rows(const Tensor& q, const Tensor* scale, const Tensor& out, int threads);

}  // namespace pyadapt::cpu
