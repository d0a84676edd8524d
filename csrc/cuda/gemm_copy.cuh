// From an operand in global memory to its panels in shared memory, a depth step at a time.
#pragma once

#include "gemm_tile.cuh"

namespace pyadapt::cuda::gemm_parts {

// One thread's share of an operand's panels: chunks below one another, `apart` rows from each to the next. What lies
// outside the operand is zero, on both sides of the product: garbage times zero could be NaN.
template <class Element, class Panel, class Tile, bool fragment_order>
struct Copier {
    static constexpr int chunk_elements = 16 / int(sizeof(Element));
    static constexpr int apart = Tile::threads / Panel::chunks, count = Panel::rows / apart;
    static_assert(Tile::threads % Panel::chunks == 0 && Panel::rows % apart == 0);

    const Element* source;      // of the first chunk
    std::int64_t stride;        // between rows
    int rows, columns;          // of the operand, from the first chunk on; may be negative
    bool aligned;               // chunks may be read whole
    uint4 held[Tile::turing ? count : 1];

    // (row, column) is the panel's corner, total_* the operand's size.
    __device__ __forceinline__ Copier(const void* data, std::int64_t stride, int row, int total_rows, int column,
                                      int total_columns, bool aligned)
        : stride(stride), aligned(aligned) {
        const int chunk_row = threadIdx.x / Panel::chunks, chunk_column = threadIdx.x % Panel::chunks * chunk_elements;
        rows = total_rows - row - chunk_row;
        columns = total_columns - column - chunk_column;
        source = static_cast<const Element*>(data) + (row + std::int64_t(chunk_row)) * stride + column + chunk_column;
    }

    __device__ __forceinline__ void go_right(int step) { source += step, columns -= step; }
    __device__ __forceinline__ void go_down(int step) { source += step * stride, rows -= step; }

    // How many elements of chunk i there are.
    __device__ __forceinline__ int valid(int i) const {
        return i * apart < rows ? max(0, min(columns, chunk_elements)) : 0;
    }

    static __device__ __forceinline__ uint4* place(unsigned char* panel, int i) {
        const unsigned row = threadIdx.x / Panel::chunks + i * apart;
        const unsigned kept_at = fragment_order ? fragment_column<false>(row) : row;
        return reinterpret_cast<uint4*>(panel + Panel::offset(kept_at, threadIdx.x % Panel::chunks));
    }

    // Chunk i, element by element.
    __device__ __forceinline__ uint4 gather(int i) const {
        using Bits = std::conditional_t<sizeof(Element) == 1, unsigned char, unsigned short>;
        const Bits* elements = reinterpret_cast<const Bits*>(source + i * apart * stride);
        const int limit = valid(i);
        std::uint32_t words[4] = {};
#pragma unroll
        for (int e = 0; e < chunk_elements; ++e) {
            const int byte = e * int(sizeof(Element));
            if (e < limit) words[byte / 4] |= std::uint32_t(elements[e]) << byte % 4 * 8;
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }

    // Start the copies; the panel is whole after copy_async_wait and a barrier.
    __device__ __forceinline__ void copy(unsigned char* panel) const {
        if (aligned) {
#pragma unroll
            for (int i = 0; i < count; ++i)
                copy_async_16(place(panel, i), source + i * apart * stride, valid(i) * int(sizeof(Element)));
        } else {
#pragma unroll
            for (int i = 0; i < count; ++i) *place(panel, i) = gather(i);
        }
    }

    // The same in two halves by way of registers, where there are no asynchronous copies: the loads travel while the
    // thread multiplies.
    __device__ __forceinline__ void load() {
#pragma unroll
        for (int i = 0; i < count; ++i)
            held[i] = aligned && valid(i) == chunk_elements
                          ? *reinterpret_cast<const uint4*>(source + i * apart * stride)
                          : gather(i);
    }
    __device__ __forceinline__ void store(unsigned char* panel) const {
#pragma unroll
        for (int i = 0; i < count; ++i) *place(panel, i) = held[i];
    }
};

}  // namespace pyadapt::cuda::gemm_parts
