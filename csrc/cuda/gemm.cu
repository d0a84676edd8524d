// The frozen product with the low-rank term, kernels 1 and 2:
//
//   out = alpha (left right') column_scale + mask(low_scale low_left low_right') + bias
//
// Forward: left x, right W, low_left S, low_right B. dx: left g, right W', low_left dS, low_right A', and the mask of
// drop(x) is made again. The low-rank term is a second, short depth loop into the same sums, so that out is written
// once; it is fp32 in memory and tf32 in the tensor cores, where fp16 could overflow.
//
// A block makes one tile of out, a warp a part of it:
//
//            K                       N                   128 columns
//       +---------+             +---------+              +-----+-----+
//     M | left    |  depth of 32| right'  | 128 columns  | w0  | w2  | 64 rows
//       | 128 rows|  a step     |         |              +-----+-----+
//       +---------+             +---------+              | w1  | w3  |
//                                                        +-----+-----+ 64 columns
//
// What the choices buy:
//   panels without padding    a step is 16 KB, three are 48 KB: two blocks on every multiprocessor, even of 100 KB
//   three or four stages      the copies of the next steps travel while one is multiplied
//   int8 widened in registers bytes on the way and in shared memory; 2 to 4 instructions for two numbers
//   64 x 64 for a warp        4 KB read from shared memory for 32 multiplications: less than the tensor cores' time
//   tiles in groups of 8 rows blocks that run together share rows of left and of right in the L2
//   64 x 64 tiles             where 128 x 128 ones would leave multiprocessors idle
//   a tile for sm_75          no cp.async there: the next step waits in registers, which half as many sums leave free
#include <algorithm>
#include <climits>

#include "gemm_copy.cuh"
#include "gemm_epilogue.cuh"
#include "launch.cuh"

namespace pyadapt::cuda {
namespace gemm_parts {

// A product and what its launch has settled.
struct Work {
    Gemm product;
    bool left_aligned, right_aligned, out_aligned;
    int stages;
    int terms_offset;  // in shared memory
    int tiles_down, tiles_across;
};

constexpr int tile_group = 8;  // rows of tiles that are walked together, column by column

// The tile of a block.
struct TileIndex {
    int down, across;
};
__device__ __forceinline__ TileIndex tile_of_block(const Work& work) {
    const int group_tiles = tile_group * work.tiles_across;
    const int group = blockIdx.x / group_tiles, in_group = blockIdx.x % group_tiles;
    const int height = min(tile_group, work.tiles_down - group * tile_group);
    return {group * tile_group + in_group % height, in_group / height};
}

// sums += left right' over the whole depth, for the tile with this corner.
template <class T, class Right, bool along_columns, class Tile>
__device__ __forceinline__ void multiply_depth(Accumulators<Tile>& sums, const Work& work, int row0, int column0,
                                               unsigned char* shared) {
    using Multiply = Multiplier<T, Right, along_columns, Tile>;
    using LeftRows = LeftPanel<Tile>;
    using RightRows = RightPanel<Right, along_columns, Tile>;
    constexpr int stage_bytes = LeftRows::bytes + RightRows::bytes;

    const Gemm& product = work.product;
    Copier<T, LeftRows, Tile, false> left(product.left, product.left_stride, row0, product.M, 0, product.K,
                                          work.left_aligned);
    Copier<Right, RightRows, Tile, !along_columns> right(
        product.right, product.right_stride, along_columns ? 0 : column0, along_columns ? product.K : product.N,
        along_columns ? column0 : 0, along_columns ? product.N : product.K, work.right_aligned);
    const auto advance = [&] {
        left.go_right(depth_step);
        if constexpr (along_columns) right.go_down(depth_step);
        else right.go_right(depth_step);
    };
    const int steps = product.K / depth_step + (product.K % depth_step != 0);

    if constexpr (Tile::turing) {
        const auto load = [&] { left.load(), right.load(), advance(); };
        const auto store = [&](unsigned char* stage) { left.store(stage), right.store(stage + LeftRows::bytes); };
        load();
        store(shared);
        for (int step = 0; step < steps; ++step) {
            __syncthreads();
            unsigned char* stage = shared + step % 2 * stage_bytes;
            const bool more = step + 1 < steps;
            if (more) load();
            Multiply::add(sums, stage, stage + LeftRows::bytes);
            if (more) store(shared + (step + 1) % 2 * stage_bytes);
        }
    } else {
        const auto copy = [&](int step, int slot) {
            if (step < steps) {
                unsigned char* stage = shared + slot * stage_bytes;
                left.copy(stage), right.copy(stage + LeftRows::bytes), advance();
            }
            copy_async_commit();  // of nothing near the end, so that the count of groups stays right
        };
        const int ahead = work.stages - 1;
        for (int step = 0; step < ahead; ++step) copy(step, step);
        int read = 0, write = ahead;
        for (int step = 0; step < steps; ++step) {
            if (work.stages == 3) copy_async_wait<1>();
            else copy_async_wait<2>();
            __syncthreads();  // this stage has come, and all are done with the one before, which is written next
            copy(step + ahead, write);
            const unsigned char* stage = shared + read * stage_bytes;
            Multiply::add(sums, stage, stage + LeftRows::bytes);
            write = read;
            read = read + 1 == work.stages ? 0 : read + 1;
        }
        copy_async_wait<0>();
    }
    Multiply::settle(sums);
}

// Each tile is compiled for the architectures it is meant for, and is empty for the others.
template <class T, class Right, bool along_columns, class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks) gemm_kernel(const Work work) {
    if constexpr (Tile::turing == (PYADAPT_ARCH < 800)) {
        PYADAPT_DYNAMIC_SHARED(shared);
        const Gemm& product = work.product;
        const TileIndex tile = tile_of_block(work);
        const int row0 = tile.down * Tile::rows, column0 = tile.across * Tile::columns;
        Terms<Tile>& terms = *reinterpret_cast<Terms<Tile>*>(shared + work.terms_offset);
        using Finish = Epilogue<T, Multiplier<T, Right, along_columns, Tile>::exchanged, Tile>;
        Finish(product, row0, column0, work.out_aligned).stage_terms(terms);

        Accumulators<Tile> sums = {};
        if (product.K > 0) multiply_depth<T, Right, along_columns, Tile>(sums, work, row0, column0, shared);
        else __syncthreads();  // the terms are there
        if (product.add_out) Finish(product, terms, work.out_aligned).add_out(sums);
        Finish(product, terms, work.out_aligned).scale_columns(sums, terms);
        if (product.rank > 0) Finish(product, terms, work.out_aligned).add_low_rank(sums, shared, terms);
        Finish(product, terms, work.out_aligned).store(sums, terms);
    }
}

constexpr int tiles(int size, int tile) { return size / tile + (size % tile != 0); }

bool aligned(const void* data, std::int64_t stride, int element_bytes, int bytes) {
    return reinterpret_cast<std::uintptr_t>(data) % bytes == 0 && stride * element_bytes % bytes == 0;
}

template <class T, class Right, bool along_columns, class Tile>
cudaError_t launch_tile(const Gemm& product, const Launch& launch) {
    constexpr int stage_bytes = LeftPanel<Tile>::bytes + RightPanel<Right, along_columns, Tile>::bytes;
    // 100 KB of shared memory for two blocks, where others have 164 KB or more.
    const bool tight = launch.capability == 86 || launch.capability == 89 || launch.capability >= 120;
    const int stages = Tile::turing ? 2 : tight && 4 * stage_bytes > 48 * 1024 ? 3 : 4;
    const int panels = std::max(stages * stage_bytes, Epilogue<T, false, Tile>::shared_bytes);
    const Work work = {product,
                       aligned(product.left, product.left_stride, sizeof(T), 16),
                       aligned(product.right, product.right_stride, sizeof(Right), 16),
                       aligned(product.out, product.out_stride, sizeof(T), 8),
                       stages,
                       panels,
                       tiles(product.M, Tile::rows),
                       tiles(product.N, Tile::columns)};
    const std::int64_t blocks = std::int64_t(work.tiles_down) * work.tiles_across;
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    return launch_kernel(gemm_kernel<T, Right, along_columns, Tile>, dim3(static_cast<unsigned>(blocks)), Tile::threads,
                         panels + sizeof(Terms<Tile>), launch.stream, work);
}

// Whether 128 x 128 tiles take longer than 64 x 64 ones: in rounds of all multiprocessors, where a large tile is four
// times the work, which the small one does at some 70 % of its rate.
bool prefers_small(const Gemm& product, const Launch& launch) {
    const auto rounds = [&](int rows, int columns) {
        const std::int64_t blocks = std::int64_t(tiles(product.M, rows)) * tiles(product.N, columns);
        return (blocks + launch.multiprocessors - 1) / launch.multiprocessors;
    };
    return 10 * 4 * rounds(Large::rows, Large::columns) > 14 * rounds(Small::rows, Small::columns);
}

template <class T, class Right, bool along_columns>
cudaError_t choose_tile(const Gemm& product, const Launch& launch) {
    if (launch.capability < 80) {
        if constexpr (std::is_same_v<T, __half>) return launch_tile<T, Right, along_columns, Turing>(product, launch);
        else return cudaErrorNotSupported;
    }
    if (prefers_small(product, launch)) return launch_tile<T, Right, along_columns, Small>(product, launch);
    return launch_tile<T, Right, along_columns, Large>(product, launch);
}

template <class T>
cudaError_t choose_right(const Gemm& product, const Launch& launch) {
    const bool bytes = product.right_dtype == DType::i8;
    if (product.right_along_columns)
        return bytes ? choose_tile<T, std::int8_t, true>(product, launch) : choose_tile<T, T, true>(product, launch);
    return bytes ? choose_tile<T, std::int8_t, false>(product, launch) : choose_tile<T, T, false>(product, launch);
}

}  // namespace gemm_parts

cudaError_t gemm(const Gemm& product, const Launch& launch) {
    if (product.M == 0 || product.N == 0) return cudaSuccess;
    return product.dtype == DType::f16 ? gemm_parts::choose_right<__half>(product, launch)
                                       : gemm_parts::choose_right<__nv_bfloat16>(product, launch);
}

}  // namespace pyadapt::cuda
