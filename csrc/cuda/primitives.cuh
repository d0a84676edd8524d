// Every instruction that the kernels write as inline PTX, and the one way to shared memory. Nothing else in csrc/cuda
// contains inline PTX: the tests run the same kernel sources on the CPU by putting another header in the place of this
// one (tests/emulator, docs/cuda-testing.md).
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments"):
//   16x8x16, 16 bits: a[0..3] hold rows (g, g+8, g, g+8), columns (2t, 2t, 2t+8, 2t+8) and the next one in the high half;
//                     b[0..1] hold depth (2t, 2t+8) and the next one, column g.
//   16x8x8, tf32:     a[0..3] hold rows (g, g+8, g, g+8), columns (t, t, t+4, t+4); b[0..1] hold depth (t, t+4), column g.
//   d[0..3]:          rows (g, g, g+8, g+8), columns (2t, 2t+1, 2t, 2t+1).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef PYADAPT_EMULATOR
#include "emulated_primitives.hpp"  // which also says which PYADAPT_ARCH is emulated
#else

// The architecture that device code is compiled for: 750, 800, ... 0 while the host's half of a file is.
#ifdef __CUDA_ARCH__
#define PYADAPT_ARCH __CUDA_ARCH__
#else
#define PYADAPT_ARCH 0
#endif

#define PYADAPT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace pyadapt::cuda {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// d += a b for a (16 x 16) and b (16 x 8) of 16-bit floats; sums in fp32. sm_75 has no bf16.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], __half) {
#if PYADAPT_ARCH >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                            __nv_bfloat16) {
#if PYADAPT_ARCH >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

// x with the 10 bits of mantissa that tf32 has, rounded to nearest; every fp16 and bf16 value is its own. sm_75 has no
// tf32 and multiplies in fp32, so nothing is rounded there.
__device__ __forceinline__ float round_tf32(float x) {
#if PYADAPT_ARCH >= 800
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
#else
    return x;
#endif
}

// d += a b for a (16 x 8) and b (8 x 8), values of round_tf32; sums in fp32. On sm_75 the quads hand their operands
// round and multiply in fp32: slower than tensor cores, and there the memory is slower still.
__device__ __forceinline__ void mma_16x8x8(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if PYADAPT_ARCH >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
    const int lane = threadIdx.x % 32, row = lane & ~3, column = lane % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float upper = __shfl_sync(0xffffffffu, a[2 * half], row + k);
            const float lower = __shfl_sync(0xffffffffu, a[2 * half + 1], row + k);
            const float left = __shfl_sync(0xffffffffu, b[half], column + k);
            const float right = __shfl_sync(0xffffffffu, b[half], column + 4 + k);
            d[0] = fmaf(upper, left, d[0]);
            d[1] = fmaf(upper, right, d[1]);
            d[2] = fmaf(lower, left, d[2]);
            d[3] = fmaf(lower, right, d[3]);
        }
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of matrix i / 8,
// aligned to 16 bytes; r[j] of a lane holds row g, elements 2t and 2t+1 of matrix j.
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same with each matrix transposed: r[j] holds rows 2t and 2t+1 of column g.
__device__ __forceinline__ void load_matrix_x4_transposed(std::uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The first `bytes` (0 to 16) of 16 bytes of global memory to shared memory, zeros behind them; both addresses aligned to
// 16 bytes. The destination means nothing until copy_async_wait and a barrier. sm_75 copies at once.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
#if PYADAPT_ARCH >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
#else
    uint4 value = make_uint4(0, 0, 0, 0);
    if (bytes == 16) {
        value = *static_cast<const uint4*>(global);
    } else {
        unsigned char* out = reinterpret_cast<unsigned char*>(&value);
        for (int i = 0; i < 16; ++i)
            if (i < bytes) out[i] = static_cast<const unsigned char*>(global)[i];
    }
    *static_cast<uint4*>(shared) = value;
#endif
}

// Close the group of this thread's copies since the last call.
__device__ __forceinline__ void copy_async_commit() {
#if PYADAPT_ARCH >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most `pending` of this thread's groups are still on their way.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
#if PYADAPT_ARCH >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace pyadapt::cuda
#endif
