#include "weight.hpp"

#include <string>

#include "checks.hpp"
#include "error.hpp"

namespace pyadapt {

void check_weight(const Weight& weight, std::int64_t N, std::int64_t K, bool any_scaled) {
    check_shape(*weight.values, {"N", N}, {"K", K});
    check_rows_or_columns(*weight.values);
    const bool int8 = weight.values->dtype == DType::i8;
    if (!int8) check_floating(*weight.values);
    if (any_scaled ? int8 && !weight.scale : int8 != (weight.scale != nullptr))
        throw ValueError(int8 ? "weight is int8 but weight_scale is None; wanted a float32 scale for each output row"
                              : std::string("weight_scale is given for a ") + name_of(weight.values->dtype) +
                                    " weight; wanted None, or an int8 weight");
}

void check_per_output(const Weight& weight, std::int64_t N) {
    if (weight.scale) check_vector_fp32(*weight.scale, {"N", N});
    if (weight.bias) {
        check_shape(*weight.bias, {"N", N});
        check_floating(*weight.bias);
        check_rows(*weight.bias);
    }
}

void check_quantizing(const Tensor& w, const Tensor& q, const Tensor& scale) {
    const std::int64_t N = w.sizes[0], K = w.sizes[1];
    check_matrix(w, {"N", N}, {"K", K});
    check_shape(q, {"N", N}, {"K", K});
    check_dtype(q, DType::i8);
    check_output(q);
    check_shape(scale, {"N", N});
    check_dtype(scale, DType::f32);
    check_output(scale);
}

void check_dequantizing(const Tensor& q, const Tensor* scale, const Tensor& out) {
    const std::int64_t N = q.sizes[0], K = q.sizes[1];
    check_shape(q, {"N", N}, {"K", K});
    check_dtype(q, DType::i8);
    check_rows(q);
    check_per_output({&q, scale, nullptr}, N);
    check_result(out, {"N", N}, {"K", K});
}

}  // namespace pyadapt
