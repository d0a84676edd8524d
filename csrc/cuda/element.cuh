// Elements: conversions, and reading one whose dtype is known at run time only.
#pragma once

#include <cstring>
#include <type_traits>

#include "../core/dtype.hpp"
#include "primitives.cuh"

namespace pyadapt::cuda {

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }

// Element `index` of memory of a floating dtype.
__device__ __forceinline__ float load_element(const void* data, DType dtype, std::int64_t index) {
    if (dtype == DType::f32) return static_cast<const float*>(data)[index];
    if (dtype == DType::f16) return to_float(static_cast<const __half*>(data)[index]);
    return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
}

__device__ __forceinline__ void store_element(void* data, DType dtype, std::int64_t index, float value) {
    if (dtype == DType::f32) static_cast<float*>(data)[index] = value;
    else if (dtype == DType::f16) static_cast<__half*>(data)[index] = from_float<__half>(value);
    else static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
}

// Two 16-bit values in one word, `low` first in memory.
template <class T>
__device__ __forceinline__ std::uint32_t pack(T low, T high) {
    static_assert(sizeof(T) == 2);
    unsigned short bits[2];
    memcpy(bits, &low, 2);
    memcpy(bits + 1, &high, 2);
    return bits[0] | static_cast<std::uint32_t>(bits[1]) << 16;
}

// The two values of such a word.
template <class T>
__device__ __forceinline__ float2 unpack(std::uint32_t word) {
    static_assert(sizeof(T) == 2);
    const unsigned short bits[2] = {static_cast<unsigned short>(word), static_cast<unsigned short>(word >> 16)};
    T low, high;
    memcpy(static_cast<void*>(&low), bits, 2);
    memcpy(static_cast<void*>(&high), bits + 1, 2);
    return {to_float(low), to_float(high)};
}

// Two of the four signed bytes in a word, as two numbers of T: exact, as T has a mantissa of 8 bits or more. The
// selector is of __byte_perm: 4 stands for the exponent's byte.
template <class T>
__device__ __forceinline__ std::uint32_t widen(std::uint32_t bytes, unsigned selector) {
    std::uint32_t word;
    if constexpr (std::is_same_v<T, __half>) {
        // 0x6400 | u is 1024 + u, and u = byte + 128.
        const std::uint32_t biased = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, selector);
        const __half2 difference = __hsub2(reinterpret_cast<const __half2&>(biased), __float2half2_rn(1024 + 128));
        memcpy(&word, &difference, 4);
    } else {
        // 0x4300 | low 7 bits is 128 + them, 0x4300 | top bit is 128 or 256: their difference is the byte.
        const std::uint32_t raw = __byte_perm(bytes, 0x43434343u, selector);
        const std::uint32_t value = raw & 0xff7fff7fu, sign = raw & 0xff80ff80u;
        const __nv_bfloat162 difference =
            __hsub2(reinterpret_cast<const __nv_bfloat162&>(value), reinterpret_cast<const __nv_bfloat162&>(sign));
        memcpy(&word, &difference, 4);
    }
    return word;
}

}  // namespace pyadapt::cuda
