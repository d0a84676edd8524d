// The DLPack exchange structures (version 0.x, the capsule named "dltensor"), as far as the core reads them.
// The layout is the one of the public specification: https://dmlc.github.io/dlpack/latest/c_api.html
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

// A checked view of a CPU tensor of one or two dimensions; ValueError or TypeError by name otherwise.
Tensor import_tensor(const View& view, const char* name);

}  // namespace pyadapt::dlpack
