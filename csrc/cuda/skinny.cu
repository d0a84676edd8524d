// Kernel 6, the forward of few rows (decoding): W is streamed from memory once, and x is small.
//
//   out = alpha (x W') column_scale + low_scale low_left low_right' + bias      x (M, K), M <= 64; W (N, K); out (M, N)
//
// The roles are swapped: rows of W are the 16 rows of a multiplication, rows of x its 8 columns, so that M = 1 wastes
// 7/8 of the tensor cores, which have nothing else to do, but no memory traffic. A warp has 32 rows of W; a block's 8
// warps share out rows and depth:
//
//    M       columns   warps on rows x depth   rows of W a block
//    <= 8       8            1 x 8                   32
//    <= 16     16            1 x 8                   32
//    <= 32     32            2 x 4                   64
//    <= 64     64            4 x 2                  128
//
// What the choices buy:
//   W straight to registers    a lane reads 16 bytes of a row, operands of two multiplications (of four, for int8):
//                              the order of the depths within a sum is free. Four steps are on their way: 64 KB for a
//                              block; two for M > 32
//   int8 widened in registers  W is read as bytes; the scale of a row comes in the end
//   depth over the warps       32 rows of W are enough for a block: 4096 rows fill 128 multiprocessors, in one kernel
//   x in shared memory         in slices, a stage ahead, by cp.async; read 16 bytes wide without bank conflicts
//   slices of the depth        where there are fewer rows of W: their parts of out go to the workspace in fp32, and a
//                              second kernel adds them in their order
//   low-rank term from shared  its operands, scale and bias are fetched while the first bytes of W are on their way
//     memory
#include "kernels.hpp"
#include "stream.cuh"

namespace pyadapt::cuda {
namespace skinny_parts {

using namespace stream_parts;

constexpr int warps = 8, threads = 32 * warps;
constexpr int row_tiles = 2, warp_rows = 16 * row_tiles;  // of W
constexpr int stage_bytes = 16 * 1024;  // of x
constexpr int rank_step = 16;
constexpr int least_slice = 512;  // of the depth: less is not worth the second kernel's reading

// What a block of `tiles` times 8 columns, rows of x, looks like over a W of `Right`.
template <class Right, int tiles>
struct Shape {
    static constexpr int columns = 8 * tiles;
    static constexpr int warps_down = tiles < 4 ? 1 : tiles / 2, warps_deep = warps / warps_down;
    static constexpr int rows = warps_down * warp_rows;
    static constexpr int lane_depth = 16 / int(sizeof(Right)), warp_depth = 4 * lane_depth;  // of a step
    static constexpr int stage_row_bytes = stage_bytes / columns, stage_depth = stage_row_bytes / 2;
    static constexpr int steps_of_stage = stage_depth / (warps_deep * warp_depth);
    static constexpr int steps_ahead = tiles < 8 ? 4 : 2;  // on their way; registers for more are taken by the sums
    static_assert(steps_of_stage > 0 && steps_ahead % steps_of_stage == 0 && stage_row_bytes % 128 == 0);

    // Shared memory: two stages of x, and in their place in the end the sums; behind them what the epilogue needs.
    // The gaps let the lanes of a warp write, or read, different banks.
    static constexpr int sum_stride = rows + 4, rank_stride = rank_step + 1;
    static constexpr int low_offset = std::max(2 * stage_bytes, columns * sum_stride * 4);
    static constexpr int column_offset = low_offset + (rows + columns) * rank_stride * 4;
    static constexpr int shared_bytes = column_offset + 2 * rows * 4;
    static_assert(shared_bytes <= 48 * 1024);

    // Where a stage has the chunk of this number of row m of x. A quarter of a warp reads two rows, of which it needs
    // every chunk of 64 bytes or, for int8, every second one of 128.
    static __device__ __forceinline__ int offset(int m, int chunk) {
        return m * stage_row_bytes + 16 * (chunk ^ m % 2 * (sizeof(Right) == 1 ? 1 : 4));
    }
};

// A product and what its launch has settled.
struct Work {
    Gemm product;
    bool left_in_chunks, right_in_chunks;
    Slices slices;
    float* parts;  // (slices, M, N), or null for one slice
};

// A stage of x: depths first .. first + stage_depth - 1. Rows behind the last one hold what they held: their columns of
// the sums are not stored.
template <class T, class Shape>
__device__ __forceinline__ void copy_stage(unsigned char* stage, const Work& work, int first) {
    constexpr int chunks = Shape::stage_row_bytes / 16;
    const Gemm& product = work.product;
#pragma unroll
    for (int i = threadIdx.x; i < stage_bytes / 16; i += threads) {
        const int m = i / chunks, chunk = i % chunks, k = first + 8 * chunk;
        if (m >= product.M) break;
        const T* row = static_cast<const T*>(product.left) + m * product.left_stride;
        uint4* to = reinterpret_cast<uint4*>(stage + Shape::offset(m, chunk));
        const int valid = max(0, min(product.K - k, 8));
        if (work.left_in_chunks) copy_async_16(to, valid > 0 ? row + k : row, 2 * valid);
        else *to = load_chunk(row, k, product.K, false);
    }
}

// sums += W x' for 32 depths: a[i] and b are the lane's eight depths, of rows g, g+8, ... of W and of row g of x.
template <class T, class Shape, int tiles>
__device__ __forceinline__ void multiply(float (&sums)[row_tiles][tiles][4], const std::uint32_t (&a)[2 * row_tiles][4],
                                         const unsigned char* stage, int chunk) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int j = 0; j < tiles; ++j) {
        const uint4 x = *reinterpret_cast<const uint4*>(stage + Shape::offset(8 * j + g, chunk));
        const std::uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < row_tiles; ++i) {
                const std::uint32_t rows[4] = {a[2 * i][2 * half], a[2 * i + 1][2 * half], a[2 * i][2 * half + 1],
                                               a[2 * i + 1][2 * half + 1]};
                mma_16x8x16(sums[i][j], rows, b[half], T());
            }
    }
}

// The same for a lane's 16 bytes of each row, the step's number `step` within the stage.
template <class T, class Right, int tiles>
__device__ __forceinline__ void multiply_step(float (&sums)[row_tiles][tiles][4], const uint4 (&w)[2 * row_tiles],
                                              const unsigned char* stage, int step) {
    using Shape = skinny_parts::Shape<Right, tiles>;
    const int t = threadIdx.x % 4;
    std::uint32_t a[2 * row_tiles][4];
    if constexpr (sizeof(Right) == 2) {
#pragma unroll
        for (int i = 0; i < 2 * row_tiles; ++i) a[i][0] = w[i].x, a[i][1] = w[i].y, a[i][2] = w[i].z, a[i][3] = w[i].w;
        multiply<T, Shape>(sums, a, stage, 4 * step + t);
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2 * row_tiles; ++i) {
                const std::uint32_t first = half ? w[i].z : w[i].x, second = half ? w[i].w : w[i].y;
                a[i][0] = widen<T>(first, 0x4140), a[i][1] = widen<T>(first, 0x4342);
                a[i][2] = widen<T>(second, 0x4140), a[i][3] = widen<T>(second, 0x4342);
            }
            multiply<T, Shape>(sums, a, stage, 8 * step + 2 * t + half);
        }
    }
}

// What follows the sums, of rows n0 .. n0 + Shape::rows - 1 of W: columns of out.
template <class T, class Shape>
struct Epilogue {
    const Work& work;
    unsigned char* shared;
    int n0;

    __device__ __forceinline__ float* sum(int m, int row) const {
        return reinterpret_cast<float*>(shared) + m * Shape::sum_stride + row;
    }
    // low_right of row n0 + i, or low_left of row i - Shape::rows.
    __device__ __forceinline__ float* low(int i, int q) const {
        return reinterpret_cast<float*>(shared + Shape::low_offset) + i * Shape::rank_stride + q;
    }
    __device__ __forceinline__ float* scale(int row) const {
        return reinterpret_cast<float*>(shared + Shape::column_offset) + row;
    }
    __device__ __forceinline__ float* bias(int row) const { return scale(row) + Shape::rows; }
    // Scale is for every slice, the rest is added once.
    __device__ __forceinline__ bool leads() const { return blockIdx.y == 0; }

    __device__ __forceinline__ void fetch_columns() const {
        const Gemm& product = work.product;
        for (int row = threadIdx.x; row < Shape::rows; row += threads) {
            const int n = n0 + row;
            if (n >= product.N) return;
            *scale(row) = product.column_scale ? product.alpha * product.column_scale[n] : product.alpha;
            *bias(row) = product.bias && leads() ? load_element(product.bias, product.bias_dtype, n) : 0.0f;
        }
    }

    // The operands of the low-rank term for ranks first .. first + rank_step - 1.
    __device__ __forceinline__ void fetch_ranks(int first) const {
        const Gemm& product = work.product;
        const Matrix& right = product.low_right;
        for (int i = threadIdx.x; i < (Shape::rows + Shape::columns) * rank_step; i += threads) {
            const int row = i / rank_step, q = i % rank_step, n = n0 + row, m = row - Shape::rows;
            float value = 0.0f;
            if (first + q >= product.rank) {
            } else if (row < Shape::rows) {
                if (n < product.N)
                    value = load_element(right.data, right.dtype,
                                         n * right.row_stride + (first + q) * right.column_stride);
            } else if (m < product.M) {
                value = product.low_left[std::int64_t(m) * product.rank + first + q];
            }
            *low(row, q) = value;
        }
    }

    // The sums of the warps that share rows, the deepest first: in one order, whoever is faster.
    template <int tiles>
    __device__ __forceinline__ void gather(const float (&sums)[row_tiles][tiles][4], int warp_down,
                                           int warp_deep) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (int turn = Shape::warps_deep - 1; turn >= 0; --turn) {
            __syncthreads();
            if (turn != warp_deep) continue;
#pragma unroll
            for (int i = 0; i < row_tiles; ++i)
#pragma unroll
                for (int j = 0; j < tiles; ++j)
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        float* to = sum(8 * j + 2 * t + c % 2, warp_down * warp_rows + 16 * i + c / 2 * 8 + g);
                        *to = turn == Shape::warps_deep - 1 ? sums[i][j][c] : *to + sums[i][j][c];
                    }
        }
        __syncthreads();
    }

    // body(m, row) for this thread's elements, always the same ones.
    template <class Body>
    __device__ __forceinline__ void each(Body body) const {
        for (int i = threadIdx.x; i < Shape::rows * work.product.M; i += threads)
            if (n0 + i % Shape::rows < work.product.N) body(i / Shape::rows, i % Shape::rows);
    }

    __device__ __forceinline__ void finish() const {
        const Gemm& product = work.product;
        each([&](int m, int row) { *sum(m, row) *= *scale(row); });
        for (int first = 0; first < product.rank && leads(); first += rank_step) {
            if (first > 0) {
                __syncthreads();
                fetch_ranks(first);
                __syncthreads();
            }
            each([&](int m, int row) {
                float term = 0.0f;
#pragma unroll
                for (int q = 0; q < rank_step; ++q) term = fmaf(*low(Shape::rows + m, q), *low(row, q), term);
                *sum(m, row) += product.low_scale * term;
            });
        }
        float* part = work.parts ? work.parts + std::int64_t(blockIdx.y) * product.M * product.N : nullptr;
        each([&](int m, int row) {
            const float value = *sum(m, row) + *bias(row);
            if (part) part[std::int64_t(m) * product.N + n0 + row] = value;
            else static_cast<T*>(product.out)[m * product.out_stride + n0 + row] = from_float<T>(value);
        });
    }
};

template <class T, class Right, int tiles>
__global__ void __launch_bounds__(threads, 1) skinny_kernel(const Work work) {
    if constexpr (PYADAPT_ARCH >= 800 || std::is_same_v<T, __half>) {
        PYADAPT_DYNAMIC_SHARED(shared);
        using Shape = skinny_parts::Shape<Right, tiles>;
        constexpr int ahead = Shape::steps_ahead;
        const Gemm& product = work.product;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        const int warp_down = warp / Shape::warps_deep, warp_deep = warp % Shape::warps_deep;
        const int n0 = blockIdx.x * Shape::rows;
        const int first = blockIdx.y * work.slices.depth, depth = min(product.K - first, work.slices.depth);
        const int stages = depth / Shape::stage_depth + (depth % Shape::stage_depth != 0);
        const int steps = stages * Shape::steps_of_stage;
        const Epilogue<T, Shape> epilogue{work, shared, n0};

        // Rows behind the last one are the last one: their sums are not stored.
        const Right* rows[2 * row_tiles];
#pragma unroll
        for (int i = 0; i < 2 * row_tiles; ++i)
            rows[i] = static_cast<const Right*>(product.right) +
                      min(n0 + warp_down * warp_rows + 8 * i + g, product.N - 1) * product.right_stride;

        const auto copy = [&](int stage) {
            if (stage < stages)
                copy_stage<T, Shape>(shared + stage % 2 * stage_bytes, work, first + stage * Shape::stage_depth);
            copy_async_commit();
        };
        copy(0);

        float sums[row_tiles][tiles][4] = {};
        uint4 w[ahead][2 * row_tiles];
        for (int several = -ahead; several < max(steps, 1); several += ahead)
#pragma unroll
            for (int b = 0; b < ahead; ++b) {
                const int step = several + b;
                if (b == 0 && step == 0) {  // the first steps of W are on their way
                    epilogue.fetch_columns();
                    if (product.rank > 0 && epilogue.leads()) epilogue.fetch_ranks(0);
                }
                if (step >= 0 && step < steps) {
                    const int stage = step / Shape::steps_of_stage, in_stage = b % Shape::steps_of_stage;
                    if (in_stage == 0) {
                        copy_async_wait<0>();
                        __syncthreads();  // this stage has come, and all are done with the one before
                        copy(stage + 1);
                    }
                    multiply_step<T, Right, tiles>(sums, w[b], shared + stage % 2 * stage_bytes,
                                                   in_stage * Shape::warps_deep + warp_deep);
                }
                if (step + ahead < steps) {
                    const int k = first + ((step + ahead) * Shape::warps_deep + warp_deep) * Shape::warp_depth;
#pragma unroll
                    for (int i = 0; i < 2 * row_tiles; ++i)
                        w[b][i] = load_chunk(rows[i], k + t * Shape::lane_depth, product.K, work.right_in_chunks);
                }
            }
        copy_async_wait<0>();

        epilogue.gather(sums, warp_down, warp_deep);
        epilogue.finish();
    }
}

int column_tiles(int M) { return M > 32 ? 8 : M > 16 ? 4 : M > 8 ? 2 : 1; }

// Rows of W for a block, and the depth of its stages: both are the same for int8 and 16 bits.
int block_rows(int tiles) { return (tiles < 4 ? 1 : tiles / 2) * warp_rows; }
int stage_depth(int tiles) { return stage_bytes / (8 * tiles) / 2; }

// One slice where the rows of W keep half the machine busy, which is enough to read them: it saves the second kernel.
Slices slices_of(const Gemm& product, const Launch& launch) {
    const int tiles = column_tiles(product.M), rows = block_rows(tiles);
    const std::int64_t blocks = std::max<std::int64_t>(1, (std::int64_t(product.N) + rows - 1) / rows);
    return cut(product.K, stage_depth(tiles), least_slice, launch.multiprocessors / blocks);
}

template <class T, class Right, int tiles>
cudaError_t launch_tiles(const Work& work, const Launch& launch) {
    using Shape = skinny_parts::Shape<Right, tiles>;
    const unsigned blocks = (unsigned(work.product.N) + Shape::rows - 1) / Shape::rows;
    return launch_kernel(skinny_kernel<T, Right, tiles>, dim3(blocks, work.slices.count), threads, Shape::shared_bytes,
                         launch.stream, work);
}

template <class T, class Right>
cudaError_t choose_tiles(const Work& work, const Launch& launch) {
    switch (column_tiles(work.product.M)) {
        case 1: return launch_tiles<T, Right, 1>(work, launch);
        case 2: return launch_tiles<T, Right, 2>(work, launch);
        case 4: return launch_tiles<T, Right, 4>(work, launch);
        default: return launch_tiles<T, Right, 8>(work, launch);
    }
}

template <class T>
cudaError_t run(const Work& work, const Launch& launch) {
    const Gemm& product = work.product;
    const cudaError_t error = product.right_dtype == DType::i8 ? choose_tiles<T, std::int8_t>(work, launch)
                                                               : choose_tiles<T, T>(work, launch);
    if (error != cudaSuccess || !work.parts) return error;
    const std::int64_t elements = std::int64_t(product.M) * product.N;
    return sum_slices<T>({work.parts, work.slices.count, product.N, elements, static_cast<T*>(product.out),
                          product.out_stride},
                         launch.stream);
}

}  // namespace skinny_parts

std::size_t skinny_workspace(const Gemm& product, const Launch& launch) {
    const int slices = skinny_parts::slices_of(product, launch).count;
    return slices > 1 ? sizeof(float) * slices * product.M * product.N : 0;
}

cudaError_t skinny(const Gemm& product, void* workspace, const Launch& launch) {
    using namespace skinny_parts;
    if (product.M == 0 || product.N == 0) return cudaSuccess;
    if (product.M > skinny_rows) return cudaErrorInvalidValue;
    if (product.dtype == DType::bf16 && launch.capability < 80) return cudaErrorNotSupported;
    const Slices slices = slices_of(product, launch);
    const Work work = {product,
                       in_chunks(product.left, product.left_stride, 2),
                       in_chunks(product.right, product.right_stride, size_of(product.right_dtype)),
                       slices,
                       slices.count > 1 ? static_cast<float*>(workspace) : nullptr};
    return product.dtype == DType::f16 ? run<__half>(work, launch) : run<__nv_bfloat16>(work, launch);
}

}  // namespace pyadapt::cuda
