// Tiles of the product in shared memory and in registers, and their multiplication.
//
// A panel is a tile of one operand in shared memory: rows of 16-byte chunks, whose places within a row are exchanged
// (xor) by the row's number. Eight rows of one chunk, which is what a matrix of ldmatrix reads, then lie in all 32
// banks, and nothing is spent on padding.
//
// Which column of out a column of a fragment stands for is ours to choose, as long as the right operand and out agree.
// The choice: after `settle`, of every 16 columns a lane holds four adjacent ones, in two rows: stores are 8 bytes
// wide, and one Philox call makes the lane's mask.
#pragma once

#include <type_traits>

#include "element.cuh"

namespace pyadapt::cuda::gemm_parts {

constexpr int depth_step = 32;  // of a panel

// rows x columns of out for a block, warp_rows x warp_columns of it for a warp.
template <int rows_, int columns_, int warp_rows_, int warp_columns_, int blocks_, bool turing_>
struct Tile {
    static constexpr int rows = rows_, columns = columns_, warp_rows = warp_rows_, warp_columns = warp_columns_;
    static constexpr int warps_down = rows / warp_rows, threads = 32 * warps_down * (columns / warp_columns);
    static constexpr int down = warp_rows / 16, across = warp_columns / 8;  // fragments of a warp
    static constexpr int blocks = blocks_;                                  // on a multiprocessor
    static constexpr bool turing = turing_;
};
using Large = Tile<128, 128, 64, 64, 2, false>;
using Small = Tile<64, 64, 32, 32, 3, false>;
using Turing = Tile<128, 64, 64, 32, 2, true>;

template <class Tile>
using Accumulators = float[Tile::down][Tile::across][4];

template <int rows_, int row_bytes_>
struct Panel {
    static constexpr int rows = rows_, row_bytes = row_bytes_, chunks = row_bytes / 16, bytes = rows * row_bytes;
    static constexpr int spread = chunks < 8 ? chunks : 8;
    static __device__ __forceinline__ unsigned offset(unsigned row, unsigned chunk) {
        return row * row_bytes + 16 * (chunk ^ row / (8 / spread) % spread);
    }
    // From a chunk to the one so many rows further down, a multiple of 8: the same for all, so that a thread keeps one
    // address for all its fragments.
    static __device__ __forceinline__ unsigned below(unsigned rows_of_8) { return rows_of_8 * row_bytes; }
};

// The panel of the right operand: (columns, depth), or (depth, columns) where that is how it is stored.
template <class Right, bool along_columns, class Tile>
using RightPanel = std::conditional_t<along_columns, Panel<depth_step, Tile::columns * int(sizeof(Right))>,
                                      Panel<Tile::columns, depth_step * int(sizeof(Right))>>;
template <class Tile>
using LeftPanel = Panel<Tile::rows, depth_step * 2>;

// Of the four groups of four columns, the one that lane t of a quad holds. ldmatrix.trans gives 16-bit columns in
// their own order, from which one exchange between neighbours leads to 0 2 1 3.
template <bool exchanged>
__device__ __forceinline__ unsigned group_of_lane(unsigned t) {
    return exchanged ? t / 2 + t % 2 * 2 : t;
}

// Where column n of out stands among the columns of the fragments: the first fragment of a pair has the first two of
// each lane's four. Panels whose rows are columns of out keep them in this order.
template <bool exchanged>
__device__ __forceinline__ unsigned fragment_column(unsigned n) {
    const unsigned t = group_of_lane<exchanged>(n / 4 % 4);
    return n / 16 * 16 + n / 2 % 2 * 8 + 2 * t + n % 2;
}

// This thread's place in the block.
template <class Tile>
struct Place {
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned row = warp % Tile::warps_down * Tile::warp_rows, column = warp / Tile::warps_down * Tile::warp_columns;
};

// Multiplies panels: one of the left operand, one of the right.
template <class T, class Right, bool along_columns, class Tile>
struct Multiplier {
    static constexpr bool narrow = sizeof(Right) == 1;
    static constexpr bool exchanged = along_columns && !narrow;
    using LeftRows = LeftPanel<Tile>;
    using RightRows = RightPanel<Right, along_columns, Tile>;

    static __device__ __forceinline__ void add(Accumulators<Tile>& sums, const unsigned char* left,
                                               const unsigned char* right) {
        if constexpr (narrow && !along_columns) add_bytes(sums, left, right);
        else
#pragma unroll
            for (int depth = 0; depth < depth_step; depth += 16) {
                std::uint32_t b[Tile::across][2];
                load_right(b, right, depth);
                add_step(sums, left, b, depth);
            }
    }

    // The fragments of 16 depths of the right panel.
    static __device__ __forceinline__ void load_right(std::uint32_t (&b)[Tile::across][2], const unsigned char* right,
                                                      int depth) {
        const Place<Tile> place;
        const unsigned row = place.lane % 16;
        std::uint32_t r[4];
        if constexpr (narrow) {
            // As 16-bit elements the bytes come in pairs of columns: even columns make one fragment, odd ones another.
#pragma unroll
            for (int j = 0; j < Tile::across; j += 4) {
                const unsigned chunk = place.column / 16 + j / 2 + place.lane / 16;
                load_matrix_x4_transposed(r, right + RightRows::offset(row, chunk) + RightRows::below(depth));
#pragma unroll
                for (int pair = 0; pair < 2; ++pair)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        b[j + 2 * pair][half] = widen<T>(r[2 * pair + half], 0x4240);
                        b[j + 2 * pair + 1][half] = widen<T>(r[2 * pair + half], 0x4341);
                    }
            }
        } else {
#pragma unroll
            for (int j = 0; j < Tile::across; j += 2) {
                if constexpr (along_columns) {
                    const unsigned chunk = place.column / 8 + j + place.lane / 16;
                    load_matrix_x4_transposed(r, right + RightRows::offset(row, chunk) + RightRows::below(depth));
                } else {
                    const unsigned column = place.lane % 8 + place.lane / 16 * 8;
                    load_matrix_x4(r, right + RightRows::offset(column, depth / 8 + place.lane / 8 % 2) +
                                          RightRows::below(place.column + 8 * j));
                }
                b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
            }
        }
    }

    static __device__ __forceinline__ void add_step(Accumulators<Tile>& sums, const unsigned char* left,
                                                    const std::uint32_t (&b)[Tile::across][2], int depth) {
        const Place<Tile> place;
#pragma unroll
        for (int i = 0; i < Tile::down; ++i) {
            std::uint32_t a[4];
            load_matrix_x4(a, left + LeftRows::offset(place.lane % 16, depth / 8 + place.lane / 16) +
                                  LeftRows::below(place.row + 16 * i));
#pragma unroll
            for (int j = 0; j < Tile::across; ++j) mma_16x8x16(sums[i][j], a, b[j], T());
        }
    }

    // Bytes with unit stride along the depth. The order of the depths within a sum is free: lane t takes the eight
    // from 8t on, which lie side by side in both panels, four of them for each of two steps.
    static __device__ __forceinline__ void add_bytes(Accumulators<Tile>& sums, const unsigned char* left,
                                                     const unsigned char* right) {
        const Place<Tile> place;
        const unsigned g = place.lane / 4, t = place.lane % 4;
        std::uint32_t b[Tile::across][2][2];
#pragma unroll
        for (int j = 0; j < Tile::across; ++j) {
            const unsigned offset = RightRows::offset(g, t / 2) + t % 2 * 8 + RightRows::below(place.column + 8 * j);
            const uint2 bytes = *reinterpret_cast<const uint2*>(right + offset);
            b[j][0][0] = widen<T>(bytes.x, 0x4140), b[j][0][1] = widen<T>(bytes.x, 0x4342);
            b[j][1][0] = widen<T>(bytes.y, 0x4140), b[j][1][1] = widen<T>(bytes.y, 0x4342);
        }
#pragma unroll
        for (int i = 0; i < Tile::down; ++i) {
            const unsigned char* row = left + LeftRows::offset(g, t) + LeftRows::below(place.row + 16 * i);
            const uint4 upper = *reinterpret_cast<const uint4*>(row);
            const uint4 lower = *reinterpret_cast<const uint4*>(row + LeftRows::below(8));
            const std::uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
            const std::uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
            for (int j = 0; j < Tile::across; ++j) mma_16x8x16(sums[i][j], first, b[j][0], T());
#pragma unroll
            for (int j = 0; j < Tile::across; ++j) mma_16x8x16(sums[i][j], second, b[j][1], T());
        }
    }

    // Bring the sums into the order of fragment_column.
    static __device__ __forceinline__ void settle(Accumulators<Tile>& sums) {
        if constexpr (!along_columns) return;
        const bool odd = threadIdx.x % 2;
#pragma unroll
        for (int i = 0; i < Tile::down; ++i)
#pragma unroll
            for (int j = 0; j < Tile::across; j += 2)
#pragma unroll
                for (int e = 0; e < 4; e += narrow ? 2 : 1) {
                    float(&x)[4] = sums[i][j], (&y)[4] = sums[i][j + 1];
                    if constexpr (narrow) {
                        const float even_column = x[e + 1];
                        x[e + 1] = y[e];
                        y[e] = even_column;
                    } else {
                        const float received = __shfl_xor_sync(0xffffffffu, odd ? x[e] : y[e], 1);
                        if (odd) x[e] = received;
                        else y[e] = received;
                    }
                }
    }
};

}  // namespace pyadapt::cuda::gemm_parts
