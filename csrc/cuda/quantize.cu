// Row-wise symmetric int8, kernel 12, and the panels of kernel 7:
//
//   scale = max |w| / 127 of each row      q = round to nearest even(w / scale)      out = q scale factor
//
// Bit for bit the plain-torch reference of pyadapt/ops/quantize.py: IEEE divisions, fp32 throughout.
//
// Quantising, a block owns a row and reads it twice, the second time from a cache: once for the largest magnitude, once
// for q. Magnitudes are compared as the bits of |w|, whose order is that of the numbers with Inf and then NaN on top:
// neither can get lost in a maximum.
//
// Dequantising, a thread owns a group of columns that fills a 16-byte store, and takes several rows at once so that
// their loads are on the way together. Threads lie along the columns first: neighbours touch neighbouring memory.
//
// Both are bound by memory. Groups go by vector accesses where pointers and strides allow that, else by elements.
#include <type_traits>

#include "element.cuh"
#include "kernels.hpp"
#include "launch.cuh"

namespace pyadapt::cuda {
namespace {

constexpr float levels = 127.0f;
constexpr unsigned infinity_bits = 0x7f800000u;
constexpr int warp_size = 32;
constexpr int most_threads = 256;
constexpr int rows_at_once = 4;

int pieces(std::int64_t n, std::int64_t size) { return static_cast<int>((n + size - 1) / size); }

// Whether every row starts at a multiple of `bytes`.
bool rows_aligned(const void* data, std::int64_t stride, int element_size, unsigned bytes) {
    return reinterpret_cast<std::uintptr_t>(data) % bytes == 0 && stride * element_size % bytes == 0;
}

// As many threads as there are groups in a row: a power of two from `fewest` on.
int threads_for(int groups, int fewest) {
    int threads = fewest;
    while (threads < groups && threads < most_threads) threads *= 2;
    return threads;
}

// The columns that one thread handles at a time: 16 bytes of T, and 4 or 8 of int8.
template <class T>
struct Group {
    static constexpr int size = 16 / sizeof(T);
    using Bytes = std::conditional_t<sizeof(T) == 4, std::uint32_t, uint2>;  // the same columns in int8
};

// The first `count` of a group, zeros behind them; together they are one Word.
template <class Word, class Element, int size>
__device__ __forceinline__ void load_as(const Element* from, int count, bool vector, Element (&elements)[size]) {
    static_assert(sizeof(Word) == sizeof(elements));
    if (vector && count >= size) {
        const Word word = *reinterpret_cast<const Word*>(from);
        memcpy(static_cast<void*>(elements), &word, sizeof(word));
    } else {
#pragma unroll
        for (int i = 0; i < size; ++i) elements[i] = i < count ? from[i] : Element();
    }
}

// The first `count` of a group, which together is one Word.
template <class Word, class Element, int size>
__device__ __forceinline__ void store_as(Element* to, int count, bool vector, const Element (&elements)[size]) {
    static_assert(sizeof(Word) == sizeof(elements));
    if (vector && count >= size) {
        Word word;
        memcpy(&word, elements, sizeof(word));
        *reinterpret_cast<Word*>(to) = word;
    } else {
#pragma unroll
        for (int i = 0; i < size; ++i)
            if (i < count) to[i] = elements[i];
    }
}

// --- quantize ---

struct QuantizeKernel {
    Quantize pass;
    bool vector;
};

// The largest of `value` over the block, in every thread.
__device__ __forceinline__ unsigned block_max(unsigned value) {
    PYADAPT_DYNAMIC_SHARED(shared);
    unsigned* of_warp = reinterpret_cast<unsigned*>(shared);
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
    if (threadIdx.x % warp_size == 0) of_warp[threadIdx.x / warp_size] = value;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / warp_size; ++warp) value = max(value, of_warp[warp]);
    return value;
}

__device__ __forceinline__ std::int8_t quantized(float value, float divisor) {
    const float level = rintf(value / divisor);
    return static_cast<std::int8_t>(static_cast<int>(fminf(fmaxf(level, -levels), levels)));
}

template <class T>
__global__ void __launch_bounds__(most_threads) quantize_kernel(QuantizeKernel kernel) {
    constexpr int size = Group<T>::size;
    const Quantize& pass = kernel.pass;
    const std::int64_t row = blockIdx.x;
    const T* w = static_cast<const T*>(pass.w) + row * pass.w_stride;
    std::int8_t* q = pass.q + row * pass.q_stride;
    const int first = threadIdx.x * size, step = blockDim.x * size;
    T values[size];

    unsigned peak = 0;
    for (int k = first; k < pass.columns; k += step) {
        load_as<uint4>(w + k, pass.columns - k, kernel.vector, values);
#pragma unroll
        for (int i = 0; i < size; ++i) peak = max(peak, __float_as_uint(fabsf(to_float(values[i]))));
    }
    peak = block_max(peak);

    const bool finite = peak < infinity_bits;
    const float scale = __uint_as_float(peak) / levels;
    if (threadIdx.x == 0) pass.scale[row] = finite ? scale : __uint_as_float(0x7fffffffu);
    const float divisor = scale > 0.0f ? scale : 1.0f;
    for (int k = first; k < pass.columns; k += step) {
        const int count = pass.columns - k;
        load_as<uint4>(w + k, count, kernel.vector, values);
        std::int8_t levels_of_group[size];
#pragma unroll
        for (int i = 0; i < size; ++i)
            levels_of_group[i] = finite ? quantized(to_float(values[i]), divisor) : std::int8_t{0};
        store_as<typename Group<T>::Bytes>(q + k, count, kernel.vector, levels_of_group);
    }
}

template <class T>
cudaError_t quantize_as(const Quantize& pass, const Launch& launch) {
    constexpr int size = Group<T>::size;
    const bool vector =
        rows_aligned(pass.w, pass.w_stride, sizeof(T), 16) && rows_aligned(pass.q, pass.q_stride, 1, size);
    const int threads = threads_for(pieces(pass.columns, size), warp_size);
    return launch_kernel(quantize_kernel<T>, dim3(pass.rows), threads, threads / warp_size * sizeof(unsigned),
                         launch.stream, QuantizeKernel{pass, vector});
}

// --- dequantize ---

struct DequantizeKernel {
    Dequantize pass;
    int column_threads;  // of a block, a power of two; the others lie along the rows
    int column_blocks;
    bool vector;
};

template <class T>
__global__ void __launch_bounds__(most_threads) dequantize_kernel(DequantizeKernel kernel) {
    constexpr int size = Group<T>::size;
    const Dequantize& pass = kernel.pass;
    const int column_block = blockIdx.x % kernel.column_blocks, row_block = blockIdx.x / kernel.column_blocks;
    const int k = (column_block * kernel.column_threads + threadIdx.x % kernel.column_threads) * size;
    const int count = pass.columns - k;
    if (count <= 0) return;
    const int block_rows = blockDim.x / kernel.column_threads;
    const std::int64_t first = static_cast<std::int64_t>(row_block) * rows_at_once * block_rows +
                               threadIdx.x / kernel.column_threads;
    std::int8_t q[rows_at_once][size];
    float scale[rows_at_once];
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
        const std::int64_t row = first + i * block_rows;
        if (row >= pass.rows) break;
        load_as<typename Group<T>::Bytes>(pass.q + row * pass.q_stride + k, count, kernel.vector, q[i]);
        scale[i] = pass.scale ? pass.scale[row] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
        const std::int64_t row = first + i * block_rows;
        if (row >= pass.rows) return;
        T elements[size];
#pragma unroll
        for (int j = 0; j < size; ++j) elements[j] = from_float<T>(q[i][j] * scale[i] * pass.factor);
        store_as<uint4>(static_cast<T*>(pass.out) + row * pass.out_stride + k, count, kernel.vector, elements);
    }
}

template <class T>
cudaError_t dequantize_as(const Dequantize& pass, const Launch& launch) {
    constexpr int size = Group<T>::size;
    const bool vector =
        rows_aligned(pass.q, pass.q_stride, 1, size) && rows_aligned(pass.out, pass.out_stride, sizeof(T), 16);
    const int groups = pieces(pass.columns, size);
    const int column_threads = threads_for(groups, 1);
    const int column_blocks = pieces(groups, column_threads);
    const int row_blocks = pieces(pass.rows, most_threads / column_threads * rows_at_once);
    return launch_kernel(dequantize_kernel<T>, dim3(static_cast<unsigned>(row_blocks) * column_blocks), most_threads, 0,
                         launch.stream, DequantizeKernel{pass, column_threads, column_blocks, vector});
}

}  // namespace

cudaError_t quantize(const Quantize& pass, const Launch& launch) {
    if (pass.rows == 0) return cudaSuccess;
    if (pass.dtype == DType::f32) return quantize_as<float>(pass, launch);
    if (pass.dtype == DType::f16) return quantize_as<__half>(pass, launch);
    return quantize_as<__nv_bfloat16>(pass, launch);
}

cudaError_t dequantize(const Dequantize& pass, const Launch& launch) {
    if (pass.rows == 0 || pass.columns == 0) return cudaSuccess;
    if (pass.dtype == DType::f32) return dequantize_as<float>(pass, launch);
    if (pass.dtype == DType::f16) return dequantize_as<__half>(pass, launch);
    return dequantize_as<__nv_bfloat16>(pass, launch);
}

}  // namespace pyadapt::cuda
