// Elements: conversions, and reading one whose dtype is known at run time only.
#pragma once

#include <cstring>

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

}  // namespace pyadapt::cuda
