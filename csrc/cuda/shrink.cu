// Kernel 3, the S pass: out = alpha drop(x) small', with x (M, K) of 16 bits read once; small (rank, K), out (M, rank)
// fp32.
//
// A block takes 256 rows of x over a slice of the depth, a warp 32 of the rows, and all warps the same 8 to 64 rows of
// small:
//
//             slice of K                       rank
//           +------------+                    +----+
//       256 | x: straight to registers    256 | sums in registers
//      rows |  32 of a warp               rows|    |
//           +------------+                    +----+
//           | small: in fragments, in shared memory, 2 stages of 16 KB
//           +------------+
//
// What the choices buy:
//   x never in shared memory   a lane reads 16 bytes of a row, its operands of four multiplications: the order of the
//                              depths within a sum is free, so lane t of a quad takes depths 8t .. 8t+7 of 32. Two
//                              steps are on their way while one is multiplied: 32 KB for a block
//   tf32, small in two parts   x is exact in tf32; small = high + low keeps 21 bits of it: nearly the sums of fp32, at
//                              the speed of tensor cores. A 16-bit small is exact, and costs one product
//   small as fragments         one warp splits a fragment for all eight, and stores it in the order in which lanes read
//                              it, 16 bytes wide and without bank conflicts
//   256 rows                   small comes from the L2 once for them: an eighth of the bytes of x at rank 16
//   slices of the depth        fill the machine where M does not; their sums go to the workspace, and a second kernel
//                              adds them in their order
//   dropout on the raw bits    a Philox call serves half of the 16 bytes, and a dropped element becomes the bits of 0
//   sm_75 without fragments    it has no tf32, and its shuffles are no faster than its FMAs: each lane multiplies what
//                              it has read, in fp32
#include "philox.cuh"
#include "stream.cuh"

namespace pyadapt::cuda {
namespace shrink_parts {

using namespace stream_parts;

constexpr int warps = 8, threads = 32 * warps;
constexpr int row_tiles = 2, warp_rows = 16 * row_tiles, block_rows = warps * warp_rows;
constexpr int step_depth = 32;    // of a warp's step: 8 for each lane of a quad
constexpr int chunk_bytes = 16;   // two depths of small in two parts
constexpr int stage_bytes = threads * 4 * chunk_bytes;  // 8 depths from every thread
constexpr int least_slice = 128;  // of the depth: less is not worth the second kernel's reading

// Blocks of so many tiles of 8 ranks that a multiprocessor has registers for.
constexpr int blocks_at_once(int tiles, bool tensor_cores) { return tiles > (tensor_cores ? 2 : 1) ? 1 : 2; }

constexpr int most_tiles = 8, most_tiles_of_75 = 4;

// A pass and what its launch has settled.
struct Work {
    Shrink pass;
    bool x_in_chunks, small_in_chunks;
    bool two_products;  // for small = high + low
    Slices slices;
    float* out;  // (slices, M, rank)
};

// The eight depths of one row of small that a thread brings into shared memory for all, as bits of small's dtype:
// widened only when they are stored, so that nobody waits for them before.
struct SmallPiece {
    std::uint32_t bits[8];

    __device__ __forceinline__ void load(const Work& work, int n, int k) {
        const Matrix& small = work.pass.small;
        const int left = n < work.pass.rank ? work.pass.K - k : 0;
        const std::int64_t first = n * small.row_stride + k * small.column_stride;
        if (work.small_in_chunks && left >= 8) {
            const uint4* chunks = reinterpret_cast<const uint4*>(static_cast<const float*>(small.data) + first);
            const uint4 low = chunks[0], high = chunks[1];
            bits[0] = low.x, bits[1] = low.y, bits[2] = low.z, bits[3] = low.w;
            bits[4] = high.x, bits[5] = high.y, bits[6] = high.z, bits[7] = high.w;
            return;
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            bits[e] = 0;
            if (e >= left) continue;
            const std::int64_t at = first + e * small.column_stride;
            if (small.dtype == DType::f32) bits[e] = __float_as_uint(static_cast<const float*>(small.data)[at]);
            else bits[e] = static_cast<const unsigned short*>(small.data)[at];
        }
    }

    __device__ __forceinline__ float value(DType dtype, int e) const {
        if (dtype == DType::f32) return __uint_as_float(bits[e]);
        return dtype == DType::f16 ? unpack<__half>(bits[e]).x : unpack<__nv_bfloat16>(bits[e]).x;
    }

    // To this warp's fragment of the stage: [depth pair][lane] of {high, high, low, low}.
    __device__ __forceinline__ void store(unsigned char* stage, DType dtype) const {
        float4* chunks = reinterpret_cast<float4*>(stage) + threadIdx.x / 32 * (4 * 32) + threadIdx.x % 32;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            float high[2], low[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float v = value(dtype, 2 * pair + e);
                high[e] = round_tf32(v);
                low[e] = fabsf(high[e]) < INFINITY ? round_tf32(v - high[e]) : 0.0f;
            }
            chunks[pair * 32] = make_float4(high[0], high[1], low[0], low[1]);
        }
    }
};

// Which of a lane's elements drop(x) keeps, a bit for each: 8 depths from k on, of rows row, row + 8, ...
__device__ __forceinline__ std::uint32_t survivors(const Philox& philox, const DeviceDropout& dropout, int row, int k) {
    std::uint32_t bits = 0;
#pragma unroll 1  // registers are dearer here than the loop
    for (int half = 0; half < 4 * row_tiles; ++half) {
        const uint4 draw = philox(row + half / 2 * 8, k / 4 + half % 2);
        const std::uint32_t four = kept(dropout, draw.x) | kept(dropout, draw.y) << 1 | kept(dropout, draw.z) << 2 |
                                   kept(dropout, draw.w) << 3;
        bits |= four << 4 * half;
    }
    return bits;
}

// Zeros for the others.
__device__ __forceinline__ void drop(uint4 (&x)[2 * row_tiles], std::uint32_t survivors) {
#pragma unroll
    for (int i = 0; i < 2 * row_tiles; ++i)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            std::uint32_t& word = (&x[i].x)[w];
            if (!(survivors >> (8 * i + 2 * w) & 1)) word &= 0xffff0000u;
            if (!(survivors >> (8 * i + 2 * w) & 2)) word &= 0x0000ffffu;
        }
}

// The sums of a warp: fragments of tensor cores; below sm_80 each lane adds for its own depths, in rows g, g + 8, ...,
// all 8 ranks of a tile, and the quads add theirs up in the end.
constexpr bool tensor_cores = PYADAPT_ARCH >= 800;
template <int tiles>
using Fragments = float[row_tiles][tiles][4];
template <int tiles>
using OwnSums = float[2 * row_tiles][tiles][8];
template <int tiles>
using Sums = std::conditional_t<tensor_cores, Fragments<tiles>, OwnSums<tiles>>;

// sums += x small' for 32 depths; x[2i] and x[2i + 1] hold rows g and g+8 of tile i, `small` the depths' fragments.
template <class T, int tiles, bool two_products>
__device__ __forceinline__ void multiply(Fragments<tiles>& sums, const uint4 (&x)[2 * row_tiles], const float4* small) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        float a[row_tiles][4];
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
            const float2 upper = unpack<T>((&x[2 * i].x)[pair]), lower = unpack<T>((&x[2 * i + 1].x)[pair]);
            a[i][0] = upper.x, a[i][1] = lower.x, a[i][2] = upper.y, a[i][3] = lower.y;
        }
#pragma unroll
        for (int j = 0; j < tiles; ++j) {
            const float4 parts = small[(j * 4 + pair) * 32 + threadIdx.x % 32];
            const float high[2] = {parts.x, parts.y}, low[2] = {parts.z, parts.w};
#pragma unroll
            for (int i = 0; i < row_tiles; ++i) mma_16x8x8(sums[i][j], a[i], high);
            if constexpr (two_products)
#pragma unroll
                for (int i = 0; i < row_tiles; ++i) mma_16x8x8(sums[i][j], a[i], low);
        }
    }
}

template <class T, int tiles>
__device__ __forceinline__ void multiply(OwnSums<tiles>& sums, const uint4 (&x)[2 * row_tiles], const float4* small) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        float2 a[2 * row_tiles];
#pragma unroll
        for (int i = 0; i < 2 * row_tiles; ++i) a[i] = unpack<T>((&x[i].x)[pair]);
#pragma unroll
        for (int j = 0; j < tiles; ++j)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float4* chunk = small + (j * 4 + pair) * 32 + 4 * n + threadIdx.x % 4;
                const float2 b = *reinterpret_cast<const float2*>(chunk);
#pragma unroll
                for (int i = 0; i < 2 * row_tiles; ++i)
                    sums[i][j][n] = fmaf(a[i].y, b.y, fmaf(a[i].x, b.x, sums[i][j][n]));
            }
    }
}

// From the sums of the lanes of a quad to the fragments' order: each lane sends three quarters of its ranks, and adds
// up the one that it keeps.
template <int tiles>
__device__ __forceinline__ void add_quads(const OwnSums<tiles>& own, Fragments<tiles>& sums) {
    const bool upper_half = threadIdx.x & 2, upper_quarter = threadIdx.x & 1;
#pragma unroll
    for (int i = 0; i < 2 * row_tiles; ++i)
#pragma unroll
        for (int j = 0; j < tiles; ++j) {
            float half[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float low = own[i][j][n], high = own[i][j][4 + n];
                half[n] = (upper_half ? high : low) + __shfl_xor_sync(0xffffffffu, upper_half ? low : high, 2);
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float low = half[n], high = half[2 + n];
                sums[i / 2][j][i % 2 * 2 + n] =
                    (upper_quarter ? high : low) + __shfl_xor_sync(0xffffffffu, upper_quarter ? low : high, 1);
            }
        }
}

// One sum as it is defined.
template <class T>
__device__ __forceinline__ float plain_sum(const Shrink& pass, int row, int n, int first, int last) {
    const Philox philox = philox_of(pass.dropout);
    const T* x = static_cast<const T*>(pass.x) + row * pass.x_stride;
    float sum = 0.0f;
#pragma unroll 1
    for (int k = first; k < last; ++k) {
        bool survives = true;
        if (pass.dropout.threshold > 0) {
            const uint4 draw = philox(row, k / 4);
            survives = kept(pass.dropout, k % 4 < 2 ? (k % 2 ? draw.y : draw.x) : (k % 2 ? draw.w : draw.z));
        }
        const std::int64_t at = n * pass.small.row_stride + k * pass.small.column_stride;
        sum = fmaf(survives ? to_float(x[k]) : 0.0f, load_element(pass.small.data, pass.small.dtype, at), sum);
    }
    return sum;
}

// This lane's sums over depths first .. last - 1, of the tile with this corner.
template <class T, int tiles>
__device__ __forceinline__ void store(const Work& work, const Fragments<tiles>& sums, int row0, int rank0, int first,
                                      int last) {
    const Shrink& pass = work.pass;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float factor = pass.alpha * pass.dropout.scale;
    float* out = work.out + std::int64_t(blockIdx.z) * pass.M * pass.rank;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
        for (int j = 0; j < tiles; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int row = row0 + 16 * i + c / 2 * 8 + g, n = rank0 + 8 * j + 2 * t + c % 2;
                if (row >= pass.M || n >= pass.rank) continue;
                finite &= fabsf(sums[i][j][c]) < INFINITY;
                out[std::int64_t(row) * pass.rank + n] = factor * sums[i][j][c];
            }
    if (finite || !work.two_products) return;

    // Inf times the two parts of a number may have become NaN: once more, without parts.
#pragma unroll 1
    for (int e = 0; e < row_tiles * tiles * 4; ++e) {
        const int row = row0 + e % (2 * row_tiles) * 8 + g;
        const int n = rank0 + e / (4 * row_tiles) * 8 + 2 * t + e / (2 * row_tiles) % 2;
        if (row >= pass.M || n >= pass.rank) continue;
        float& sum = out[std::int64_t(row) * pass.rank + n];
        if (!(fabsf(sum) < INFINITY)) sum = factor * plain_sum<T>(pass, row, n, first, last);
    }
}

// `tiles` of 8 ranks for a block. Each warp brings one fragment of small into a stage: 8 / tiles steps of depth in all.
template <class T, int tiles>
__global__ void __launch_bounds__(threads, blocks_at_once(tiles, tensor_cores)) shrink_kernel(const Work work) {
    if constexpr (tensor_cores || (std::is_same_v<T, __half> && tiles <= most_tiles_of_75)) {
        PYADAPT_DYNAMIC_SHARED(shared);
        constexpr int steps_of_stage = warps / tiles;
        const Shrink& pass = work.pass;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        const int row0 = blockIdx.x * block_rows + warp * warp_rows, rank0 = blockIdx.y * (8 * tiles);
        const int first = blockIdx.z * work.slices.depth, depth = min(pass.K - first, work.slices.depth);
        const int steps = depth / step_depth + (depth % step_depth != 0);
        const bool busy = row0 < pass.M, dropout = pass.dropout.threshold > 0;
        const Philox philox = dropout ? philox_of(pass.dropout) : Philox{};

        const T* x_row = static_cast<const T*>(pass.x) + (row0 + g) * pass.x_stride;

        SmallPiece piece;
        const auto load_piece = [&](int step) {
            piece.load(work, rank0 + warp % tiles * 8 + g, first + (step + warp / tiles) * step_depth + 8 * t);
        };
        if (steps > 0) load_piece(0);

        Sums<tiles> sums = {};
        uint4 x[2][2 * row_tiles];
        for (int two = -2; two < steps; two += 2)
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const int step = two + b;
                if (step >= 0 && step < steps) {
                    const int in_stage = step % steps_of_stage;
                    unsigned char* stage = shared + step / steps_of_stage % 2 * stage_bytes;
                    if (in_stage == 0) {
                        // All are done with the stage before the last one, since they have met for the last.
                        piece.store(stage, pass.small.dtype);
                        __syncthreads();
                        if (step + steps_of_stage < steps) load_piece(step + steps_of_stage);
                    }
                    if (busy) {
                        if (dropout)
                            drop(x[b], survivors(philox, pass.dropout, row0 + g, first + step * step_depth + 8 * t));
                        const float4* small = reinterpret_cast<const float4*>(stage) + in_stage * tiles * (4 * 32);
                        if constexpr (!tensor_cores) multiply<T, tiles>(sums, x[b], small);
                        else if (work.two_products) multiply<T, tiles, true>(sums, x[b], small);
                        else multiply<T, tiles, false>(sums, x[b], small);
                    }
                }
                if (busy && step + 2 < steps)
#pragma unroll
                    for (int i = 0; i < 2 * row_tiles; ++i)
                        x[b][i] = load_chunk(x_row + 8 * i * pass.x_stride, first + (step + 2) * step_depth + 8 * t,
                                             row0 + 8 * i + g < pass.M ? pass.K : 0, work.x_in_chunks);
            }

        if constexpr (tensor_cores) {
            store<T, tiles>(work, sums, row0, rank0, first, first + depth);
        } else {
            Fragments<tiles> added;
            add_quads<tiles>(sums, added);
            store<T, tiles>(work, added, row0, rank0, first, first + depth);
        }
    }
}

int rank_tiles(int rank, const Launch& launch) {
    const int most = launch.capability < 80 ? most_tiles_of_75 : most_tiles;
    return rank > 32 ? most : rank > 16 ? 4 : rank > 8 ? 2 : 1;
}

// As many blocks as the machine can run at once.
Slices slices_of(const Shrink& pass, const Launch& launch) {
    const std::int64_t down = (std::int64_t(pass.M) + block_rows - 1) / block_rows;
    const int tiles = rank_tiles(pass.rank, launch), across = (pass.rank + 8 * tiles - 1) / (8 * tiles);
    const std::int64_t blocks = std::max<std::int64_t>(1, down * across);
    const std::int64_t at_once = blocks_at_once(tiles, launch.capability >= 80) * std::int64_t(launch.multiprocessors);
    return cut(pass.K, step_depth, least_slice, at_once / blocks);
}

template <class T, int tiles>
cudaError_t launch_tiles(const Work& work, const Launch& launch) {
    const unsigned down = (unsigned(work.pass.M) + block_rows - 1) / block_rows;
    const unsigned across = (unsigned(work.pass.rank) + 8 * tiles - 1) / (8 * tiles);
    return launch_kernel(shrink_kernel<T, tiles>, dim3(down, across, work.slices.count), threads, 2 * stage_bytes,
                         launch.stream, work);
}

template <class T>
cudaError_t choose_tiles(const Work& work, const Launch& launch) {
    switch (rank_tiles(work.pass.rank, launch)) {
        case 1: return launch_tiles<T, 1>(work, launch);
        case 2: return launch_tiles<T, 2>(work, launch);
        case 4: return launch_tiles<T, 4>(work, launch);
        default: return launch_tiles<T, 8>(work, launch);
    }
}

}  // namespace shrink_parts

std::size_t shrink_workspace(const Shrink& pass, const Launch& launch) {
    const int slices = shrink_parts::slices_of(pass, launch).count;
    return slices > 1 ? sizeof(float) * slices * pass.M * pass.rank : 0;
}

cudaError_t shrink(const Shrink& pass, const Launch& launch) {
    using namespace shrink_parts;
    if (pass.M == 0 || pass.rank == 0) return cudaSuccess;
    if (pass.dtype == DType::bf16 && launch.capability < 80) return cudaErrorNotSupported;
    const Matrix& small = pass.small;
    const Slices slices = slices_of(pass, launch);
    const bool sliced = slices.count > 1, exact = small.dtype != DType::f32;
    const Work work = {pass,
                       in_chunks(pass.x, pass.x_stride, 2),
                       !exact && small.column_stride == 1 && in_chunks(small.data, small.row_stride, 4),
                       !exact && launch.capability >= 80,  // below, products are fp32
                       slices,
                       sliced ? static_cast<float*>(pass.workspace) : pass.out};
    const cudaError_t error =
        pass.dtype == DType::f16 ? choose_tiles<__half>(work, launch) : choose_tiles<__nv_bfloat16>(work, launch);
    if (error != cudaSuccess || !sliced) return error;
    const std::int64_t elements = std::int64_t(pass.M) * pass.rank;
    return sum_slices<float>({work.out, slices.count, pass.rank, elements, pass.out, pass.rank}, launch.stream);
}

}  // namespace pyadapt::cuda
