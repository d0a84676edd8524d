#include "dlpack.hpp"

#include <string>

#include "error.hpp"

// Whose memory the module that this is compiled into works on, as a DLPack device type.
#ifndef PYADAPT_DLPACK_DEVICE
#define PYADAPT_DLPACK_DEVICE 1
#endif

namespace pyadapt::dlpack {
namespace {

constexpr std::int32_t device_cpu = 1, device_cuda = 2;

constexpr std::uint8_t code_int = 0, code_float = 2, code_bfloat = 4;

DType import_dtype(const ElementType& type, const char* name) {
    if (type.lanes == 1) {
        if (type.code == code_float && type.bits == 32) return DType::f32;
        if (type.code == code_float && type.bits == 16) return DType::f16;
        if (type.code == code_bfloat && type.bits == 16) return DType::bf16;
        if (type.code == code_int && type.bits == 8) return DType::i8;
        if (type.code == code_int && type.bits == 64) return DType::i64;
    }
    throw TypeError(std::string(name) + " has the DLPack type code " + std::to_string(type.code) + " with " +
                    std::to_string(type.bits) + " bits; wanted float32, bfloat16, float16 or int8");
}

std::string name_of_device(std::int32_t type) {
    return type == device_cpu    ? "the CPU"
           : type == device_cuda ? "a CUDA device"
                                 : "the DLPack device type " + std::to_string(type);
}

void check_device(const View& view, const char* name) {
    if (view.device.type != PYADAPT_DLPACK_DEVICE)
        throw ValueError(std::string(name) + " is on " + name_of_device(view.device.type) + "; wanted " +
                         name_of_device(PYADAPT_DLPACK_DEVICE));
}

// A view of one or two dimensions as the core sees it.
Tensor make_tensor(const View& view, const std::int64_t* sizes, const std::int64_t* strides, int dims,
                   const char* name) {
    Tensor tensor = {name, static_cast<char*>(view.data) + view.byte_offset, import_dtype(view.dtype, name), dims,
                     {1, 1}, {1, 1}, view.device.id};
    std::int64_t elements = 1;
    for (int d = 0; d < dims; ++d) elements *= sizes[d];
    std::int64_t dense = 1;
    for (int d = dims - 1; d >= 0; --d) {
        tensor.sizes[d] = sizes[d];
        // The stride of a single row or column, or of an empty tensor, means nothing and may be anything.
        tensor.strides[d] = strides && sizes[d] > 1 && elements > 0 ? strides[d] : dense;
        dense *= sizes[d];
    }
    if (elements > 0 && !view.data)
        throw ValueError(std::string(name) +
                         " has no memory behind its elements; wanted a tensor whose storage is neither fake nor freed");
    return tensor;
}

bool is_dense(const View& view) {
    std::int64_t dense = 1;
    bool empty = false, gaps = false;
    for (int d = view.dims - 1; d >= 0; --d) {
        gaps |= view.strides && view.sizes[d] > 1 && view.strides[d] != dense;
        empty |= view.sizes[d] == 0;
        dense *= view.sizes[d];
    }
    return empty || !gaps;
}

}  // namespace

bool has_unit_stride(const View& view, bool along_either) {
    if (view.dims != 2) return is_dense(view);
    const auto unit = [&](int d) { return !view.strides || view.sizes[d] <= 1 || view.strides[d] == 1; };
    return view.sizes[0] == 0 || unit(1) || (along_either && unit(0));
}

Tensor import_tensor(const View& view, const char* name) {
    check_device(view, name);
    if (view.dims < 1 || view.dims > 2)
        throw ValueError(std::string(name) + " has " + std::to_string(view.dims) + " dimensions; wanted 1 or 2");
    return make_tensor(view, view.sizes, view.strides, view.dims, name);
}

Tensor import_rows(const View& view, const char* name) {
    check_device(view, name);
    if (view.dims == 2) return make_tensor(view, view.sizes, view.strides, 2, name);
    if (view.dims < 1) throw ValueError(std::string(name) + " has no dimensions; wanted at least 1");
    if (!is_dense(view))
        throw ValueError(std::string(name) + " has " + std::to_string(view.dims) +
                         " dimensions with gaps between them; wanted two, or a contiguous tensor");
    std::int64_t sizes[2] = {1, view.sizes[view.dims - 1]};
    for (int d = 0; d < view.dims - 1; ++d) sizes[0] *= view.sizes[d];
    return make_tensor(view, sizes, nullptr, 2, name);
}

}  // namespace pyadapt::dlpack
