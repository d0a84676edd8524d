// The sum that dB and dA have in common: out (columns, rank) = small' wide, over the many rows of a wide 16-bit matrix
// (g or x) and of a small fp32 one (S or dS). It is bound by the one read of the wide matrix.
//
// The wide matrix is cut into chunks of columns and rows, a block each. A block walks down its rows, 16 at a time, over
// tiles in shared memory that are copied ahead of their use. Each of its warps owns some of the columns and keeps their
// sums in registers all the way, so that no two warps ever add to the same sum. A block serves 16 or 32 ranks; larger
// ranks take more blocks, next to each other in the grid, which read the same chunk at about the same time, mostly from
// the L2 cache.
//
// With several chunks of rows each block writes a partial sum to the workspace, and add_partials adds them in their
// order. A chunk has at most 1024 rows, for the sake of the fp32 sums.
//
// The tensor cores multiply in tf32, of which a 16-bit number is one. An fp32 number is split into two of them, and the
// product is the sum of two products, nearly as exact as an fp32 one.
#pragma once

#include <algorithm>

#include "element.cuh"
#include "kernels.hpp"
#include "launch.cuh"

namespace pyadapt::cuda::transposed_product {

constexpr int warp_size = 32;
constexpr int warps = 8;
constexpr int threads = warps * warp_size;
constexpr int tile_rows = 16;
constexpr int group_size = 8;  // 16-bit elements of a 16-byte access
constexpr int least_chunk_rows = 32;
constexpr int most_chunk_rows = 1024;

// What a block holds for a number of ranks. Sums take the same registers for both: ranks times columns is fixed.
template <int ranks>
struct Shape {
    static constexpr int warp_columns = 1024 / ranks;
    static constexpr int columns = warps * warp_columns;
    // 16 bytes of padding: the eight rows of a matrix that ldmatrix reads lie in different banks.
    static constexpr int tile_stride = columns + group_size;
    // Two of these are 8 modulo the 32 banks: fragments of 4 row pairs and 8 ranks touch each bank once.
    static constexpr int small_stride = ranks + 4;
    static constexpr int small_elements = tile_rows * small_stride;
};

// Tiles in shared memory. Where copies are synchronous a third would buy nothing.
__host__ __device__ constexpr int stages_of(int capability) { return capability >= 80 ? 3 : 2; }

// Bytes of dynamic shared memory that Walk takes.
template <int ranks>
__host__ __device__ constexpr std::size_t walk_bytes(int stages) {
    using S = Shape<ranks>;
    return stages * tile_rows * S::tile_stride * 2 + 2 * 2 * S::small_elements * sizeof(float);
}

// How a product is cut into blocks.
struct Cut {
    int ranks;  // of a block
    int rank_chunks, column_chunks, row_chunks, chunk_rows;

    std::int64_t blocks() const { return static_cast<std::int64_t>(rank_chunks) * column_chunks * row_chunks; }
};

// As many row chunks as fill `slots`, the blocks that run at the same time, in whole waves; at least one chunk of
// everything, so that a product without rows writes its zeros.
inline Cut cut_product(int rows, int columns, int rank, std::int64_t slots) {
    const auto pieces = [](std::int64_t n, std::int64_t size) {
        return std::max<std::int64_t>(1, (n + size - 1) / size);
    };
    const int ranks = rank <= 16 ? 16 : 32;
    const std::int64_t rank_chunks = pieces(rank, ranks);
    const std::int64_t column_chunks = pieces(columns, ranks == 16 ? Shape<16>::columns : Shape<32>::columns);
    const std::int64_t across = rank_chunks * column_chunks;
    const std::int64_t waves = pieces(rows * across, most_chunk_rows * slots);
    const std::int64_t wanted = std::max<std::int64_t>(1, waves * slots / across);
    const std::int64_t chunk_rows = std::clamp<std::int64_t>(pieces(pieces(rows, wanted), tile_rows) * tile_rows,
                                                             least_chunk_rows, most_chunk_rows);
    return {ranks, static_cast<int>(rank_chunks), static_cast<int>(column_chunks),
            static_cast<int>(pieces(rows, chunk_rows)), static_cast<int>(chunk_rows)};
}

// The part of a block.
struct Place {
    int rank_chunk, column_chunk, row_chunk;
    int rank, column, row;  // where it begins
    int row_end;
};

template <int ranks>
__device__ __forceinline__ Place place_of_block(const Cut& cut, int rows) {
    Place place;
    const int block = blockIdx.x / cut.rank_chunks;
    place.rank_chunk = blockIdx.x % cut.rank_chunks;
    place.column_chunk = block % cut.column_chunks;
    place.row_chunk = block / cut.column_chunks;
    place.rank = place.rank_chunk * ranks;
    place.column = place.column_chunk * Shape<ranks>::columns;
    place.row = place.row_chunk * cut.chunk_rows;
    place.row_end = min(rows - place.row, cut.chunk_rows) + place.row;
    return place;
}

// --- operands ---

// A row-major matrix of 16-bit elements. `vector`: every row starts at a multiple of 16 bytes.
struct Wide {
    const void* data;
    std::int64_t stride;
    int rows, columns;
    bool vector;
};

inline Wide wide_matrix(const void* data, std::int64_t stride, int rows, int columns) {
    const bool vector = reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % group_size == 0;
    return {data, stride, rows, columns, vector};
}

constexpr int halves = PYADAPT_ARCH >= 800 ? 2 : 1;  // that an fp32 number is split into

struct Split {
    float half[halves];
};

// Two halves add up to the value, both in tf32, high and low. The high one is cut off and not rounded, and the low one
// never 0 beside another high: the two have one sign, and times an infinity they do not cancel to NaN.
__device__ __forceinline__ Split split_tf32(float value) {
#if PYADAPT_ARCH >= 800
    const float high = __uint_as_float(__float_as_uint(value) & 0xffffe000u);
    return {{high, round_tf32(value == high ? value * 0x1p-30f : value - high)}};
#else
    return {{value}};  // nothing is rounded there
#endif
}

// --- the walk of a block down its rows ---

template <class T, int ranks>
struct Walk {
    using S = Shape<ranks>;
    static constexpr int stages = stages_of(PYADAPT_ARCH / 10);
    static constexpr int row_groups = S::columns / group_size;
    static constexpr int groups = tile_rows * row_groups / threads;  // of a tile, for each thread: one below the other
    static constexpr int small_loads = tile_rows * ranks / threads;  // elements of a tile's rows of small likewise
    static constexpr int column_tiles = S::warp_columns / 8;
    static constexpr int rank_tiles = ranks / 16;

    const Wide& wide;
    const float* small;  // (rows, rank)
    const int rank;
    const Place place;
    const int tiles;
    const int own_row, own_column;  // of this thread's first group, in a tile
    const int own_count;            // how many elements of its groups exist
    T* const tile_memory;
    float* const small_memory;
    float small_ahead[small_loads];
    float sums[rank_tiles][column_tiles][4] = {};

    __device__ __forceinline__ Walk(const Wide& wide, const float* small, int rank, const Place& place,
                                    unsigned char* shared)
        : wide(wide), small(small), rank(rank), place(place),
          tiles((place.row_end - place.row + tile_rows - 1) / tile_rows), own_row(threadIdx.x / row_groups),
          own_column(threadIdx.x % row_groups * group_size),
          own_count(max(0, min(wide.columns - place.column - own_column, group_size))),
          tile_memory(reinterpret_cast<T*>(shared)),
          small_memory(reinterpret_cast<float*>(tile_memory + stages * tile_rows * S::tile_stride)) {}

    __device__ __forceinline__ T* tile_at(int tile) const {
        return tile_memory + tile % stages * (tile_rows * S::tile_stride);
    }

    // The halves of a tile's rows of small, (tile_rows, small_stride) each.
    __device__ __forceinline__ float* small_at(int tile, int half) const {
        return small_memory + (tile % 2 * 2 + half) * S::small_elements;
    }

    // visit(row, group) for the groups of a tile that this thread copies; row of the wide matrix.
    template <class Visit>
    __device__ __forceinline__ void for_own_groups(int tile, Visit visit) const {
#pragma unroll
        for (int i = 0; i < groups; ++i) {
            const int row = own_row + i * (threads / row_groups);
            visit(place.row + tile * tile_rows + row, tile_at(tile) + row * S::tile_stride + own_column);
        }
    }

    // Start copying a tile, zeros beyond the chunk; a tile behind the last is an empty group of copies.
    __device__ __forceinline__ void copy_tile(int tile) const {
        if (tile < tiles)
            for_own_groups(tile, [&](int row, T* group) {
                const int count = row < place.row_end ? own_count : 0;
                const T* from = static_cast<const T*>(wide.data);
                if (count) from += row * wide.stride + place.column + own_column;
                if (wide.vector) return copy_async_16(group, from, count * 2);
                std::uint16_t elements[group_size];
#pragma unroll
                for (int i = 0; i < group_size; ++i)
                    elements[i] = i < count ? reinterpret_cast<const std::uint16_t*>(from)[i] : 0;
                uint4 word;
                memcpy(&word, elements, sizeof(word));
                *reinterpret_cast<uint4*>(group) = word;
            });
        copy_async_commit();
    }

    // small goes through registers, so that it is split once and not by each warp.
    __device__ __forceinline__ void load_small(int tile) {
#pragma unroll
        for (int i = 0; i < small_loads; ++i) {
            const int index = threadIdx.x + i * threads;
            const int row = place.row + tile * tile_rows + index / ranks, j = place.rank + index % ranks;
            small_ahead[i] = row < place.row_end && j < rank ? small[static_cast<std::int64_t>(row) * rank + j] : 0.0f;
        }
    }

    __device__ __forceinline__ void store_small(int tile) const {
#pragma unroll
        for (int i = 0; i < small_loads; ++i) {
            const int index = threadIdx.x + i * threads;
            const int place_in_half = index / ranks * S::small_stride + index % ranks;
            const Split split = split_tf32(small_ahead[i]);
#pragma unroll
            for (int half = 0; half < halves; ++half) small_at(tile, half)[place_in_half] = split.half[half];
        }
    }

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int tile = 0; tile < stages - 1; ++tile) copy_tile(tile);
        load_small(0);
        store_small(0);
    }

    // This thread's groups of the tile have come. A barrier makes it all threads' groups, and small's.
    __device__ __forceinline__ void wait() const { copy_async_wait<stages - 2>(); }

    // Behind that barrier the tile before this one has been used up by all: its memory takes the next.
    __device__ __forceinline__ void load_ahead(int tile) {
        copy_tile(tile + stages - 1);
        load_small(tile + 1);
    }

    // sums += small' wide over the rows of the tile. small is the left operand, ranks by rows: its rows come in the
    // order (0, 2, 4, 6, 1, 3, 5, 7) of eight, since that is how ldmatrix hands out the right one.
    __device__ __forceinline__ void add_tile(int tile) {
        const int lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
        const T* columns = tile_at(tile) + threadIdx.x / warp_size * S::warp_columns;
#pragma unroll
        for (int step = 0; step < tile_rows / 8; ++step) {
            float left[halves][rank_tiles][4];
#pragma unroll
            for (int half = 0; half < halves; ++half)
#pragma unroll
                for (int m = 0; m < rank_tiles; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        left[half][m][i] = small_at(tile, half)[(step * 8 + 2 * t + i / 2) * S::small_stride + m * 16 +
                                                                g + i % 2 * 8];
#pragma unroll
            for (int quad = 0; quad < column_tiles / 4; ++quad) {
                std::uint32_t words[4];
                load_matrix_x4_transposed(
                    words, columns + (step * 8 + lane % 8) * S::tile_stride + quad * 32 + lane / 8 * 8);
                float right[4][2];
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const float2 pair = unpack<T>(words[n]);
                    right[n][0] = pair.x;
                    right[n][1] = pair.y;
                }
                // The halves of one sum far from each other, since each waits for the one before.
#pragma unroll
                for (int half = 0; half < halves; ++half)
#pragma unroll
                    for (int n = 0; n < 4; ++n)
#pragma unroll
                        for (int m = 0; m < rank_tiles; ++m)
                            mma_16x8x8(sums[m][quad * 4 + n], left[half][m], right[n]);
            }
        }
    }

    // store(column, j, sum) for the sums of this thread that exist.
    template <class Store>
    __device__ __forceinline__ void for_sums(Store store) const {
        const int lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
        const int first = place.column + threadIdx.x / warp_size * S::warp_columns;
#pragma unroll
        for (int m = 0; m < rank_tiles; ++m)
#pragma unroll
            for (int n = 0; n < column_tiles; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = first + n * 8 + 2 * t + i % 2, j = place.rank + m * 16 + g + i / 2 * 8;
                    if (column < wide.columns && j < rank) store(column, j, sums[m][n][i]);
                }
    }
};

// --- where sums go ---

// A result of a first stage: chunk c at data + c count, times alpha.
struct Partials {
    void* data;
    DType dtype;
    float alpha;
    std::int64_t count;

    __device__ __forceinline__ void store(int chunk, std::int64_t index, float sum) const {
        store_element(data, dtype, chunk * count + index, sum * alpha);
    }
};

// out = alpha (sum of the chunks)
struct AddPartials {
    const float* partials;
    int chunks;
    std::int64_t count;
    float alpha;
    void* out;
    DType dtype;
};

// Bytes of workspace for a result of `count` elements.
inline std::size_t partial_bytes(int chunks, std::int64_t count) {
    return chunks > 1 ? chunks * count * sizeof(float) : 0;
}

}  // namespace pyadapt::cuda::transposed_product
