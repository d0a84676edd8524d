// A frozen weight with what belongs to it, and its checks.
#pragma once

#include "tensor.hpp"

namespace pyadapt {

struct Weight {
    const Tensor* values;
    const Tensor* scale;  // null unless int8
    const Tensor* bias;   // null: none
};

// values (N, K) with unit stride along either dimension, and a scale where they are int8; others have one only if
// `any_scaled`.
void check_weight(const Weight& weight, std::int64_t N, std::int64_t K, bool any_scaled = false);
// scale and bias (N,), where there are any.
void check_per_output(const Weight& weight, std::int64_t N);

// Making a weight int8 and back: w, q and out (N, K), scale (N,); of dequantising it may be null.
void check_quantizing(const Tensor& w, const Tensor& q, const Tensor& scale);
void check_dequantizing(const Tensor& q, const Tensor* scale, const Tensor& out);

}  // namespace pyadapt
