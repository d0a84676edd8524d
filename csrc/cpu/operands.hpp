// Tensors as operands of a product.
#pragma once

#include "../core/tensor.hpp"
#include "kernels.hpp"

namespace pyadapt::cpu {

// The elements of an fp32 tensor that was checked; null for none.
inline const float* floats(const Tensor* tensor) { return tensor ? static_cast<const float*>(tensor->data) : nullptr; }
inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data); }

// A matrix whose rows are the product's rows, and one whose columns are.
inline Operand rows_of(const Tensor& t) {
    return {t.data, t.dtype, t.strides[0], t.strides[1], t.strides[1] == 1, nullptr, nullptr};
}
inline Operand columns_of(const Tensor& t) {
    return {t.data, t.dtype, t.strides[1], t.strides[0], t.strides[1] != 1, nullptr, nullptr};
}

inline Operand dropped(Operand operand, const Dropout& dropout) {
    if (dropout.threshold) operand.dropout = &dropout;
    return operand;
}
inline Operand times(double alpha, Operand operand) {
    operand.alpha = static_cast<float>(alpha);
    return operand;
}

}  // namespace pyadapt::cpu
