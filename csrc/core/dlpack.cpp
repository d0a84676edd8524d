#include "dlpack.hpp"

#include <string>

#include "error.hpp"

namespace pyadapt::dlpack {
namespace {

constexpr std::int32_t device_cpu = 1;
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

}  // namespace

Tensor import_tensor(const View& view, const char* name) {
    if (view.device.type != device_cpu)
        throw ValueError(std::string(name) + " is on the DLPack device type " + std::to_string(view.device.type) +
                         "; wanted the CPU (1)");
    if (view.dims < 1 || view.dims > 2)
        throw ValueError(std::string(name) + " has " + std::to_string(view.dims) + " dimensions; wanted 1 or 2");
    Tensor tensor = {name, static_cast<char*>(view.data) + view.byte_offset, import_dtype(view.dtype, name), view.dims,
                     {1, 1}, {1, 1}};
    std::int64_t elements = 1;
    for (int d = 0; d < view.dims; ++d) elements *= view.sizes[d];
    std::int64_t dense = 1;
    for (int d = view.dims - 1; d >= 0; --d) {
        tensor.sizes[d] = view.sizes[d];
        // The stride of a single row or column, or of an empty tensor, means nothing and may be anything.
        tensor.strides[d] = view.strides && view.sizes[d] > 1 && elements > 0 ? view.strides[d] : dense;
        dense *= view.sizes[d];
    }
    return tensor;
}

}  // namespace pyadapt::dlpack
