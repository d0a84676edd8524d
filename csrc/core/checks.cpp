#include "checks.hpp"

#include <cmath>
#include <string>

#include "error.hpp"

namespace pyadapt {
namespace {

std::string pair(std::int64_t a, std::int64_t b) { return "(" + std::to_string(a) + ", " + std::to_string(b) + ")"; }

std::string shape_of(const Tensor& tensor) {
    return tensor.dims == 1 ? "(" + std::to_string(tensor.sizes[0]) + ",)" : pair(tensor.sizes[0], tensor.sizes[1]);
}

[[noreturn]] void refuse_strides(const Tensor& tensor, const char* wanted) {
    throw ValueError(std::string(tensor.name) + " has strides " + pair(tensor.strides[0], tensor.strides[1]) +
                     " for shape " + shape_of(tensor) + "; wanted " + wanted);
}

}  // namespace

void check_shape(const Tensor& tensor, Extent size) {
    if (tensor.dims == 1 && tensor.sizes[0] == size.size) return;
    throw ValueError(std::string(tensor.name) + " has shape " + shape_of(tensor) + "; wanted (" + size.letter +
                     ",) = (" + std::to_string(size.size) + ",)");
}

void check_shape(const Tensor& tensor, Extent rows, Extent cols) {
    if (tensor.dims == 2 && tensor.sizes[0] == rows.size && tensor.sizes[1] == cols.size) return;
    throw ValueError(std::string(tensor.name) + " has shape " + shape_of(tensor) + "; wanted (" + rows.letter + ", " +
                     cols.letter + ") = " + pair(rows.size, cols.size));
}

void check_dtype(const Tensor& tensor, DType wanted) {
    if (tensor.dtype == wanted) return;
    throw TypeError(std::string(tensor.name) + " is " + name_of(tensor.dtype) + "; wanted " + name_of(wanted));
}

void check_floating(const Tensor& tensor) {
    if (is_floating(tensor.dtype)) return;
    throw TypeError(std::string(tensor.name) + " is " + name_of(tensor.dtype) +
                    "; wanted float32, bfloat16 or float16");
}

void check_rows(const Tensor& tensor) {
    if (tensor.strides[tensor.dims - 1] == 1) return;
    refuse_strides(tensor, "unit stride along the last dimension");
}

void check_rows_or_columns(const Tensor& tensor) {
    if (tensor.strides[1] == 1 || tensor.strides[0] == 1) return;
    refuse_strides(tensor, "unit stride along one of the two dimensions");
}

void check_output(const Tensor& tensor) {
    check_rows(tensor);
    if (tensor.dims == 1 || tensor.sizes[0] <= 1 || tensor.strides[0] >= tensor.sizes[1]) return;
    refuse_strides(tensor, "rows that do not overlap, because it is written to");
}

void check_two_dimensional(const Tensor& tensor) {
    if (tensor.dims != 2) throw ValueError(std::string(tensor.name) + " is one-dimensional; wanted two dimensions");
}

void check_matrix(const Tensor& tensor, Extent rows, Extent cols) {
    check_shape(tensor, rows, cols);
    check_floating(tensor);
    check_rows(tensor);
}

void check_result(const Tensor& tensor, Extent rows, Extent cols) {
    check_shape(tensor, rows, cols);
    check_floating(tensor);
    check_output(tensor);
}

void check_dense(const Tensor& tensor, Extent rows, Extent cols) {
    check_result(tensor, rows, cols);
    if (rows.size > 1 && tensor.strides[0] != cols.size)
        throw ValueError(std::string(tensor.name) + " has gaps between its rows; wanted a contiguous tensor");
}

void check_dense_fp32(const Tensor& tensor, Extent rows, Extent cols) {
    check_dense(tensor, rows, cols);
    check_dtype(tensor, DType::f32);
}

void check_vector_fp32(const Tensor& tensor, Extent size) {
    check_shape(tensor, size);
    check_dtype(tensor, DType::f32);
    check_rows(tensor);
}

void check_seed(const Tensor& seed) {
    check_dtype(seed, DType::i64);
    if (seed.sizes[0] != 1 || (seed.dims == 2 && seed.sizes[1] != 1))
        throw ValueError("seed has shape " + shape_of(seed) + "; wanted one element");
}

Dropout make_dropout(double p) {
    if (!(p >= 0.0 && p <= 1.0)) throw ValueError("dropout_p is " + std::to_string(p) + "; it must lie in [0, 1]");
    // Ties to even under the default rounding mode, as Python's round().
    const auto threshold = static_cast<std::uint64_t>(std::nearbyint(p * 4294967296.0));
    return Dropout{{0, 0}, threshold, p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

void refuse_missing_seed(double p) {
    throw ValueError("dropout_p is " + std::to_string(p) +
                     ", but no seed was given: pass an int64 tensor of one element");
}

Dropout make_dropout(double p, const Tensor* seed) {
    Dropout dropout = make_dropout(p);
    if (p == 0.0) return dropout;
    if (!seed) refuse_missing_seed(p);
    check_seed(*seed);
    const auto key = *static_cast<const std::uint64_t*>(seed->data);
    dropout.key[0] = static_cast<std::uint32_t>(key);
    dropout.key[1] = static_cast<std::uint32_t>(key >> 32);
    return dropout;
}

}  // namespace pyadapt
