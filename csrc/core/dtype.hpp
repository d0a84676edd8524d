// The element types that cross into the core.
#pragma once

#include <cstdint>

namespace pyadapt {

enum class DType : std::uint8_t { f32, bf16, f16, i8, i64 };

constexpr int size_of(DType dtype) {
    return dtype == DType::i64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2;
}

constexpr const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::f32: return "float32";
        case DType::bf16: return "bfloat16";
        case DType::f16: return "float16";
        case DType::i8: return "int8";
        case DType::i64: return "int64";
    }
    return "?";
}

constexpr bool is_floating(DType dtype) {
    return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16;
}

}  // namespace pyadapt
