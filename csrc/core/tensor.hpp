// A tensor as the core sees it: memory somebody else owns, its element type and its layout.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace pyadapt {

struct Tensor {
    const char* name;  // as errors call it: "x", "weight", ...
    void* data;
    DType dtype;
    int dims;  // 1 or 2
    // In elements. A one-dimensional tensor has its size in sizes[0]. A stride that
    // no element depends on is that of a tensor without gaps.
    std::int64_t sizes[2];
    std::int64_t strides[2];
    int device = 0;  // its number, where there are several
};

}  // namespace pyadapt
