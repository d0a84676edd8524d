// CUDA's built-ins for kernels compiled by a host compiler: the keywords, the indices, the intrinsics that csrc/cuda
// uses. Conversions of fp16 and bf16 are those of the toolkit's own headers, which work on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "mma.hpp"

#undef __device__
#undef __host__
#undef __global__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __align__
#undef __restrict__
#define __device__
#define __host__
#define __global__
#define __shared__ shared_memory_only_through_PYADAPT_DYNAMIC_SHARED
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::pyadapt::emulator::current->index)
#define blockIdx (::pyadapt::emulator::block.index)
#define blockDim (::pyadapt::emulator::block.size)
#define gridDim (::pyadapt::emulator::block.grid)

// The line tells one __syncthreads from another: the lanes of a warp have to meet at the same.
inline void __syncthreads(int line = __builtin_LINE()) { pyadapt::emulator::barrier(line); }

namespace pyadapt::emulator {

inline void require_full_mask(unsigned mask) {
    if (mask != 0xffffffffu) fail("a warp instruction with a mask that is not full");
}

// A value of four bytes, moved between lanes as a word.
template <class T, class Move>
T move_word(unsigned mask, T value, Move move) {
    static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>);
    require_full_mask(mask);
    std::uint32_t word;
    __builtin_memcpy(&word, &value, 4);
    word = move(word);
    __builtin_memcpy(&value, &word, 4);
    return value;
}

}  // namespace pyadapt::emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    pyadapt::emulator::require_full_mask(mask);
    pyadapt::emulator::warp_barrier();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return pyadapt::emulator::move_word(
        mask, value, [=](std::uint32_t word) { return pyadapt::emulator::shuffle_index(word, lane); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset) {
    return pyadapt::emulator::move_word(
        mask, value, [=](std::uint32_t word) { return pyadapt::emulator::shuffle_up(word, offset); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
    return pyadapt::emulator::move_word(
        mask, value, [=](std::uint32_t word) { return pyadapt::emulator::shuffle_down(word, offset); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return pyadapt::emulator::move_word(
        mask, value, [=](std::uint32_t word) { return pyadapt::emulator::shuffle_xor(word, lanes); });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    pyadapt::emulator::require_full_mask(mask);
    return pyadapt::emulator::ballot(predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// Bits.

template <class To, class From>
To pyadapt_same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    __builtin_memcpy(&result, &value, sizeof(To));
    return result;
}
inline unsigned __float_as_uint(float x) { return pyadapt_same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return pyadapt_same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return pyadapt_same_bits<float>(x); }
inline float __int_as_float(int x) { return pyadapt_same_bits<float>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((std::uint64_t{a} * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Four bytes out of eight: each nibble of the selector names one, and its top bit spreads that byte's sign.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> (4 * i) & 15;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}

// Arithmetic.

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
    else return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
    else return T(a) < T(b) ? T(b) : T(a);
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fdividef(float a, float b) { return a / b; }

// Out of range saturates and NaN becomes 0, as cvt.rni does.
inline int __float2int_rn(float x) {
    if (std::isnan(x)) return 0;
    if (x >= 2147483648.0f) return 2147483647;
    if (x < -2147483648.0f) return -2147483647 - 1;
    return static_cast<int>(std::nearbyint(x));
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

template <class T>
T __ldg(const T* pointer) {
    return *pointer;
}
