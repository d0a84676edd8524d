// Tensors as operands of a product.
#pragma once

#include "../core/tensor.hpp"
#include "kernels.hpp"

namespace pyadapt::cpu {

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
