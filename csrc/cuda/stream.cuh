// What the kernels that stream a matrix from memory once share: reading it sixteen bytes at a time, and cutting the
// depth of a product into slices, whose sums are added in the end.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "element.cuh"
#include "launch.cuh"

namespace pyadapt::cuda::stream_parts {

// Whether all rows can be read in chunks of 16 bytes.
inline bool in_chunks(const void* data, std::int64_t row_stride, int element_bytes) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && row_stride * element_bytes % 16 == 0;
}

// Elements k .. k + 16 / sizeof(Element) - 1 of a row that has K, zeros behind its end.
template <class Element>
__device__ __forceinline__ uint4 load_chunk(const Element* row, int k, int K, bool aligned) {
    using Bits = std::conditional_t<sizeof(Element) == 1, unsigned char, unsigned short>;
    constexpr int count = 16 / int(sizeof(Element)), bits = 8 * int(sizeof(Element));
    if (aligned && K - k >= count) return *reinterpret_cast<const uint4*>(row + k);
    const Bits* elements = reinterpret_cast<const Bits*>(row) + k;
    std::uint64_t low = 0, high = 0;
#pragma unroll 1  // a rare way, at many places: short code before fast code
    for (int e = min(K - k, count) - 1; e >= 0; --e) {
        high = high << bits | low >> (64 - bits);
        low = low << bits | elements[e];
    }
    return make_uint4(low, low >> 32, high, high >> 32);
}

// A depth cut into `count` slices of `depth` elements, the last one perhaps shorter.
struct Slices {
    int count, depth;
};

// About `wanted` slices, of a multiple of `step` elements, and of `least` at least.
inline Slices cut(int K, int step, int least, std::int64_t wanted) {
    const std::int64_t steps = (std::int64_t(K) + step - 1) / step;
    const std::int64_t most = std::max<std::int64_t>(1, steps * step / least);
    wanted = std::clamp<std::int64_t>(wanted, 1, std::min<std::int64_t>(most, 65535));
    const std::int64_t steps_each = std::max<std::int64_t>(1, (steps + wanted - 1) / wanted);
    const std::int64_t count = std::max<std::int64_t>(1, (steps + steps_each - 1) / steps_each);
    return {static_cast<int>(count), static_cast<int>(std::min<std::int64_t>(steps_each * step, INT_MAX))};
}

// out = sum of parts, in their order. parts (count, rows, columns) fp32 without gaps.
template <class T>
struct SliceSum {
    const float* parts;
    int count, columns;
    std::int64_t elements;  // rows x columns
    T* out;
    std::int64_t out_stride;
};

constexpr int sum_threads = 256;

template <class T>
__global__ void __launch_bounds__(sum_threads) sum_slices_kernel(const SliceSum<T> work) {
    if constexpr (PYADAPT_ARCH >= 800 || !std::is_same_v<T, __nv_bfloat16>) {
        const std::int64_t i = std::int64_t(blockIdx.x) * sum_threads + threadIdx.x;
        if (i >= work.elements) return;
        float sum = work.parts[i];
#pragma unroll 4
        for (int part = 1; part < work.count; ++part) sum += work.parts[part * work.elements + i];
        work.out[i / work.columns * work.out_stride + i % work.columns] = from_float<T>(sum);
    }
}

template <class T>
cudaError_t sum_slices(const SliceSum<T>& work, cudaStream_t stream) {
    const std::int64_t blocks = (work.elements + sum_threads - 1) / sum_threads;
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    return launch_kernel(sum_slices_kernel<T>, dim3(static_cast<unsigned>(blocks)), sum_threads, 0, stream, work);
}

}  // namespace pyadapt::cuda::stream_parts
