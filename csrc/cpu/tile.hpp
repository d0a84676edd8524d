// The micro-kernel: a register tile of the product, fed from two panels.
#pragma once

#include "panels.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {

// Registers decide the tile: 16 of them hold 6 x 2 accumulators, 32 hold 14 x 2 (12 x 2 with 4 lanes, so that a panel
// is whole quads), two vectors of the right panel and one broadcast of the left.
constexpr int tile_vectors = 2;
#if PYADAPT_WIDTH == 16
constexpr int tile_rows = 14;
#elif defined(__aarch64__)
constexpr int tile_rows = 12;
#else
constexpr int tile_rows = 6;
#endif
constexpr int tile_cols = tile_vectors * width;

constexpr PanelShape left_panels = {tile_rows, round_up(tile_rows, 4)};
constexpr PanelShape right_panels = {tile_cols, tile_cols};

typedef void (*TileKernel)(std::int64_t units, const float* left, const float* right, float* out, std::int64_t out_stride);

// out[i, j] += sum over u of left[u, i] right[u, j], for R rows and V vectors of columns. Every element is its own
// chain of multiply-adds in the order of u: neither the tile it falls into nor the number of threads changes a bit.
template <Unit unit, int R, int V>
static void tile(std::int64_t units, const float* left, const float* right, float* out, std::int64_t out_stride) {
    Floats acc[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) acc[i][j] = load<Floats>(out + i * out_stride + j * width);
    for (std::int64_t u = 0; u < units; ++u) {
        Floats r[V];
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) r[j] = load<Floats>(right + j * width);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const Floats l = broadcast(left[i]);
#pragma GCC unroll 2
            for (int j = 0; j < V; ++j) {
#if PYADAPT_PAIRS
                if constexpr (unit == Unit::bf16_pair) {
                    acc[i][j] = dot_pairs(acc[i][j], (Words)l, (Words)r[j]);
                    continue;
                }
#endif
                acc[i][j] += l * r[j];
            }
        }
        left += left_panels.stride;
        right += right_panels.stride;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) store(out + i * out_stride + j * width, acc[i][j]);
}

// The kernel for what is left at an edge: fewer rows, or one vector of columns.
template <Unit unit, int R = tile_rows>
static TileKernel tile_kernel(std::int64_t rows, std::int64_t cols) {
    if constexpr (R > 1)
        if (rows < R) return tile_kernel<unit, R - 1>(rows, cols);
    return cols <= width ? tile<unit, R, 1> : tile<unit, R, 2>;
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
