// The twin of csrc/cuda/primitives.cuh and launch.cuh for the source route: the same names on the emulator, for the
// architecture that -DPYADAPT_ARCH says (800 unless told).
#pragma once

#include "builtins.hpp"

#ifndef PYADAPT_ARCH
#define PYADAPT_ARCH 800
#endif

// What a block may ask for: by default what the smallest machine of the architecture's kind has.
#ifndef PYADAPT_SHARED_LIMIT
#define PYADAPT_SHARED_LIMIT (PYADAPT_ARCH < 800 ? 64 * 1024 : 99 * 1024)
#endif

#define PYADAPT_DYNAMIC_SHARED(name) unsigned char* const name = ::pyadapt::emulator::shared_memory()

namespace pyadapt::cuda {

constexpr std::size_t default_shared = 48 * 1024;

inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(emulator::shared_offset(pointer));
}

inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], __half) {
#if PYADAPT_ARCH >= 800
    emulator::mma_m16n8k16<emulator::F16>(d, a, b);
#else
    emulator::mma_m16n8k8<emulator::F16>(d, a, b);
    emulator::mma_m16n8k8<emulator::F16>(d, a + 2, b + 1);
#endif
}

inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], __nv_bfloat16) {
#if PYADAPT_ARCH >= 800
    emulator::mma_m16n8k16<emulator::BF16>(d, a, b);
#else
    (void)d, (void)a, (void)b;
    emulator::fail("mma of bf16, which this architecture does not have");
#endif
}

// Half of the last kept place is added to the magnitude: nearest, ties away from zero. Infinities and NaN stay.
inline float round_tf32(float x) {
#if PYADAPT_ARCH >= 800
    const std::uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return std::isnan(x) ? __uint_as_float(0x7fffffffu) : x;
    return __uint_as_float((bits + 0x1000u) & 0xffffe000u);
#else
    return x;
#endif
}

inline void mma_16x8x8(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
    std::uint32_t a_bits[4], b_bits[2];
    for (int i = 0; i < 4; ++i) a_bits[i] = __float_as_uint(a[i]);
    for (int i = 0; i < 2; ++i) b_bits[i] = __float_as_uint(b[i]);
#if PYADAPT_ARCH >= 800
    emulator::mma_m16n8k8_tf32(d, a_bits, b_bits);
#else
    emulator::mma_m16n8k8_f32(d, a_bits, b_bits);
#endif
}

inline void load_matrix_x4(std::uint32_t (&r)[4], const void* row) { emulator::ldmatrix(r, 4, row, false); }

inline void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row) { emulator::ldmatrix(r, 4, row, true); }

inline void copy_async_16(void* shared, const void* global, int bytes) {
    emulator::copy_async(shared, global, 16, bytes, "copy_async_16");
#if PYADAPT_ARCH < 800
    emulator::wait_all_async();
#endif
}

inline void copy_async_commit() { emulator::close_async_group(); }

template <int pending>
inline void copy_async_wait() {
    emulator::wait_async(pending);
}

template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared,
                          cudaStream_t /*stream*/, Parameters... arguments) {
    if (shared > PYADAPT_SHARED_LIMIT)
        emulator::fail("a launch with " + std::to_string(shared) +
                       " bytes of shared memory, where a block has at most " + std::to_string(PYADAPT_SHARED_LIMIT));
    const auto run = [&] { kernel(arguments...); };
    emulator::launch({grid.x, grid.y, grid.z}, {static_cast<unsigned>(threads), 1, 1}, shared, run);
    return cudaSuccess;
}

}  // namespace pyadapt::cuda
