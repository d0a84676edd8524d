// The DLPack exchange structures (the capsule named "dltensor", the table of functions that a tensor type may carry), as
// far as the core reads them. The layout is the one of the public specification:
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

#include "tensor.hpp"

namespace pyadapt::dlpack {

struct Device {
    std::int32_t type;
    std::int32_t id;
};

struct ElementType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct View {
    void* data;
    Device device;
    std::int32_t dims;
    ElementType dtype;
    std::int64_t* sizes;
    std::int64_t* strides;  // in elements; null: rows without gaps
    std::uint64_t byte_offset;
};

struct Managed {
    View tensor;
    void* manager;
    void (*deleter)(Managed*);
};

// The table behind a tensor type's __dlpack_c_exchange_api__, major version 1. Only `view` is called here.
struct Exchange {
    std::uint32_t major, minor;
    Exchange* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    // Fills in a view that is good while the object lives unchanged; nonzero: a Python exception is set. May be null.
    int (*view)(void* object, View* out);
    void* current_stream;
};
constexpr std::uint32_t exchange_major = 1;

// Whether kernels can read along the last dimension, or along either of two; more than two must lie without gaps.
bool has_unit_stride(const View& view, bool along_either);

// A checked view of a tensor, on this module's kind of device, of one or two dimensions; ValueError or TypeError by name otherwise.
Tensor import_tensor(const View& view, const char* name);
// The same for (..., columns) as (rows, columns): the leading dimensions must lie without gaps.
Tensor import_rows(const View& view, const char* name);

}  // namespace pyadapt::dlpack
