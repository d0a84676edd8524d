// Checks of what a caller hands in, before any memory is touched. Each error names the tensor, what was seen and what
// was wanted.
#pragma once

#include <cstdint>

#include "philox.hpp"
#include "tensor.hpp"

namespace pyadapt {

// A dimension size with the letter of the mathematics it stands for: shape(x, {M, K}).
struct Extent {
    const char* letter;
    std::int64_t size;
};

void check_shape(const Tensor& tensor, Extent size);
void check_shape(const Tensor& tensor, Extent rows, Extent cols);

void check_dtype(const Tensor& tensor, DType wanted);
void check_floating(const Tensor& tensor);

// Rows of unit stride, with any distance between the rows.
void check_rows(const Tensor& tensor);
// Rows or columns of unit stride: a weight (N, K), or the transposed view of one stored as (K, N).
void check_rows_or_columns(const Tensor& tensor);
// An output: rows of unit stride that do not overlap.
void check_output(const Tensor& tensor);

void check_two_dimensional(const Tensor& tensor);
// A floating matrix to read, in rows.
void check_matrix(const Tensor& tensor, Extent rows, Extent cols);
// A floating matrix to write.
void check_result(const Tensor& tensor, Extent rows, Extent cols);
// One without gaps between its rows, as small matrices are kept.
void check_dense(const Tensor& tensor, Extent rows, Extent cols);
void check_dense_fp32(const Tensor& tensor, Extent rows, Extent cols);

// A vector of fp32 to read.
void check_vector_fp32(const Tensor& tensor, Extent size);

void check_seed(const Tensor& seed);
[[noreturn]] void refuse_missing_seed(double p);
// Threshold and scale of the dropout of probability p; its key is 0.
Dropout make_dropout(double p);
// With the key that seed, on the host, holds; it may be null with p = 0.
Dropout make_dropout(double p, const Tensor* seed);

}  // namespace pyadapt
