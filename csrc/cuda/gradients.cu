// The passes of backward that read a whole activation: kernel 4, the g pass, and kernel 5, the dA pass.
//
//   dS = scaling g B      dB = scaling g' S      scaled_g = g (g_scale per column) g_factor
//   dA = dS' drop(x)
//
// dB and dA are the sums of transposed_product.cuh over tiles of g and x. The g pass has two things more to do with a
// tile while it lies in shared memory. dS: each warp multiplies the columns that it owns with its rows of B, which it
// keeps in registers for the whole walk; the warps' products are added up through shared memory, one tile later, so
// that a tile takes one barrier. And scaled_g: each thread scales what it copied itself. In the dA pass each thread
// drops from what it copied, 8 columns by two calls of the generator.
//
// Traffic at rank 16 beside the read of g: partial sums of dS, a sixteenth of g, and of dB, a thirty-second where chunks
// have their 1024 rows; each is written and soon read again, mostly in the L2 cache. From rank 17 to 32 those of dS are
// a quarter of g, and larger ranks read g again; but there the tensor cores take longer than the memory.
#include <type_traits>

#include "philox.cuh"
#include "transposed_product.cuh"

namespace pyadapt::cuda {
namespace {

using namespace transposed_product;

// bf16 has no kernels below sm_80.
template <class T>
constexpr bool has_kernels = PYADAPT_ARCH >= 800 || std::is_same_v<T, __half>;

__global__ void __launch_bounds__(threads) add_partials_kernel(AddPartials sum) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (i >= sum.count) return;
    float total = 0.0f;
#pragma unroll 8
    for (int chunk = 0; chunk < sum.chunks; ++chunk) total += sum.partials[chunk * sum.count + i];
    store_element(sum.out, sum.dtype, i, sum.alpha * total);
}

cudaError_t add_partials(const AddPartials& sum, const Launch& launch) {
    if (sum.chunks <= 1 || sum.count == 0) return cudaSuccess;
    const std::int64_t blocks = (sum.count + threads - 1) / threads;
    return launch_kernel(add_partials_kernel, dim3(blocks), threads, 0, launch.stream, sum);
}

// A first stage writes a result that has one chunk at once, others to the workspace.
Partials first_stage(const AddPartials& sum) {
    if (sum.chunks <= 1) return {sum.out, sum.dtype, sum.alpha, sum.count};
    return {const_cast<float*>(sum.partials), DType::f32, 1.0f, sum.count};
}

// Blocks that run at the same time on a multiprocessor: as many as their registers let.
constexpr int gradient_blocks = 1;
constexpr int input_blocks = 2;

std::int64_t slots(const Launch& launch, int blocks) {
    return static_cast<std::int64_t>(launch.multiprocessors) * blocks;
}

// --- g pass ---

struct GradientKernel {
    Wide g;
    Matrix B;
    const float* S;
    int rank;
    Cut cut;
    Partials dS;  // over the column chunks
    Partials dB;  // over the row chunks
    const float* g_scale;
    float g_factor;
    void* scaled_g;
    bool scaled_vector;
};

// The shared memory of a block: that of the walk, the warps' products for two tiles, the factors of the columns.
template <int ranks>
constexpr int product_elements = tile_rows * ranks;  // of a warp
template <int ranks>
constexpr std::size_t gradient_bytes(int stages) {
    return walk_bytes<ranks>(stages) + (2 * warps * product_elements<ranks> + Shape<ranks>::columns) * sizeof(float);
}

// A warp's rows of B as right operands, columns of g by ranks, in the order in which ldmatrix hands out a row of g:
// columns (0, 2, 4, 6, 1, 3, 5, 7) of eight.
template <int ranks>
struct RowsOfB {
    static constexpr int steps = Shape<ranks>::warp_columns / 8, tiles = ranks / 8;
    float values[halves][steps][tiles][2];
    bool split;  // 16 bits need no low half

    __device__ __forceinline__ void load(const Matrix& B, int rank, int columns, int column, int first_rank) {
        split = halves == 2 && B.dtype == DType::f32;
        if (B.dtype == DType::f32) load_as<float>(B, rank, columns, column, first_rank);
        else if (B.dtype == DType::f16) load_as<__half>(B, rank, columns, column, first_rank);
        else load_as<__nv_bfloat16>(B, rank, columns, column, first_rank);
    }

    template <class Element>
    __device__ __forceinline__ void load_as(const Matrix& B, int rank, int columns, int column, int first_rank) {
        const int lane = threadIdx.x % warp_size, n = column + lane % 4 * 2, j = first_rank + lane / 4;
        const auto* data = static_cast<const Element*>(B.data);
#pragma unroll
        for (int step = 0; step < steps; ++step)
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int row = n + step * 8 + i, at = j + tile * 8;
                    const bool exists = row < columns && at < rank;
                    const float value = exists ? to_float(data[row * B.row_stride + at * B.column_stride]) : 0.0f;
                    const Split parts = split_tf32(value);
#pragma unroll
                    for (int half = 0; half < halves; ++half) values[half][step][tile][i] = parts.half[half];
                }
    }
};

// product = g B over the columns of this warp, 16 rows; left in fragment order, 4 elements a lane for each 8 ranks.
template <class T, int ranks>
__device__ __forceinline__ void multiply_rows(const T* columns, const RowsOfB<ranks>& B, float* product) {
    const int lane = threadIdx.x % warp_size;
    float sums[halves][ranks / 8][4] = {};  // apart, since each sum waits for the one before
#pragma unroll
    for (int pair = 0; pair < RowsOfB<ranks>::steps / 2; ++pair) {
        std::uint32_t words[4];
        load_matrix_x4(words, columns + lane % 16 * Shape<ranks>::tile_stride + pair * 16 + lane / 16 * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 upper = unpack<T>(words[2 * i]), lower = unpack<T>(words[2 * i + 1]);
            const float left[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
            for (int half = 0; half < halves; ++half) {
                if (half == 1 && !B.split) continue;
#pragma unroll
                for (int tile = 0; tile < ranks / 8; ++tile)
                    mma_16x8x8(sums[half][tile], left, B.values[half][2 * pair + i][tile]);
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < ranks / 8; ++tile) {
        float(&total)[4] = sums[0][tile];
#pragma unroll
        for (int half = 1; half < halves; ++half)
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += sums[half][tile][i];
        reinterpret_cast<float4*>(product)[tile * warp_size + lane] =
            make_float4(total[0], total[1], total[2], total[3]);
    }
}

// dS of a tile: the warps' products, added in their order.
template <int ranks>
__device__ __forceinline__ void add_products(const GradientKernel& kernel, const Place& place, int tile,
                                             const float* products) {
#pragma unroll
    for (int i = 0; i < product_elements<ranks> / threads; ++i) {
        const int index = threadIdx.x + i * threads;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < warps; ++warp) sum += products[warp * product_elements<ranks> + index];
        const int element = index % 4, lane = index / 4 % warp_size, rank_tile = index / (4 * warp_size);
        const int row = place.row + tile * tile_rows + lane / 4 + element / 2 * 8;
        const int j = place.rank + rank_tile * 8 + lane % 4 * 2 + element % 2;
        if (row < place.row_end && j < kernel.rank)
            kernel.dS.store(place.column_chunk, static_cast<std::int64_t>(row) * kernel.rank + j, sum);
    }
}

// Write a group of g, times the factors of its columns.
template <class T>
__device__ __forceinline__ void scale_group(const T* group, int count, const float* factors, T* out, bool vector) {
    T elements[group_size];
    const uint4 word = *reinterpret_cast<const uint4*>(group);
    memcpy(static_cast<void*>(elements), &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < group_size; ++i) elements[i] = from_float<T>(to_float(elements[i]) * factors[i]);
    if (vector) {
        uint4 scaled;
        memcpy(&scaled, elements, sizeof(scaled));
        *reinterpret_cast<uint4*>(out) = scaled;
    } else {
#pragma unroll
        for (int i = 0; i < group_size; ++i)
            if (i < count) out[i] = elements[i];
    }
}

template <class T, int ranks>
__global__ void __launch_bounds__(threads, gradient_blocks) gradient_kernel(GradientKernel kernel) {
    if constexpr (has_kernels<T>) {
        PYADAPT_DYNAMIC_SHARED(shared);
        const Place place = place_of_block<ranks>(kernel.cut, kernel.g.rows);
        Walk<T, ranks> walk(kernel.g, kernel.S, kernel.rank, place, shared);
        constexpr std::size_t walk_end = walk_bytes<ranks>(Walk<T, ranks>::stages);
        float* products = reinterpret_cast<float*>(shared + walk_end);
        float* factors = products + 2 * warps * product_elements<ranks>;
        const int warp = threadIdx.x / warp_size, warp_column = warp * Shape<ranks>::warp_columns;
        const auto products_at = [&](int tile) { return products + tile % 2 * warps * product_elements<ranks>; };

        walk.start();
        const bool scales = kernel.scaled_g && place.rank_chunk == 0;
        if (scales) {
            for (int i = threadIdx.x; i < Shape<ranks>::columns; i += threads) {
                const int column = place.column + i;
                factors[i] = column < kernel.g.columns ? kernel.g_scale[column] * kernel.g_factor : 0.0f;
            }
            __syncthreads();
        }
        RowsOfB<ranks> B;
        B.load(kernel.B, kernel.rank, kernel.g.columns, place.column + warp_column, place.rank);

        for (int tile = 0; tile < walk.tiles; ++tile) {
            walk.wait();
            if (scales && walk.own_count > 0)
                walk.for_own_groups(tile, [&](int row, const T* group) {
                    if (row >= place.row_end) return;
                    T* out = static_cast<T*>(kernel.scaled_g) + static_cast<std::int64_t>(row) * kernel.g.columns +
                             place.column + walk.own_column;
                    scale_group(group, walk.own_count, factors + walk.own_column, out, kernel.scaled_vector);
                });
            __syncthreads();
            walk.load_ahead(tile);
            if (tile > 0) add_products<ranks>(kernel, place, tile - 1, products_at(tile - 1));
            multiply_rows(walk.tile_at(tile) + warp_column, B, products_at(tile) + warp * product_elements<ranks>);
            walk.add_tile(tile);
            walk.store_small(tile + 1);
        }
        __syncthreads();
        if (walk.tiles > 0) add_products<ranks>(kernel, place, walk.tiles - 1, products_at(walk.tiles - 1));
        walk.for_sums([&](int n, int j, float sum) {
            kernel.dB.store(place.row_chunk, static_cast<std::int64_t>(n) * kernel.rank + j, sum);
        });
    }
}

// The two results of the pass, with their partial sums in the workspace.
struct GradientSums {
    Cut cut;
    AddPartials dS, dB;
};

GradientSums gradient_sums(const GradientPass& pass, const Launch& launch) {
    const Cut cut = cut_product(pass.M, pass.N, pass.rank, slots(launch, gradient_blocks));
    const std::int64_t dS_count = static_cast<std::int64_t>(pass.M) * pass.rank;
    const std::int64_t dB_count = static_cast<std::int64_t>(pass.N) * pass.rank;
    const auto* workspace = static_cast<const char*>(pass.workspace);
    const auto* dS = reinterpret_cast<const float*>(workspace);
    const auto* dB = reinterpret_cast<const float*>(workspace + partial_bytes(cut.column_chunks, dS_count));
    return {cut,
            {dS, cut.column_chunks, dS_count, pass.scaling, pass.dS, DType::f32},
            {dB, cut.row_chunks, dB_count, pass.scaling, pass.dB, pass.dB_dtype}};
}

template <class T, int ranks>
cudaError_t launch_gradient(const GradientKernel& kernel, const Launch& launch) {
    return launch_kernel(gradient_kernel<T, ranks>, dim3(kernel.cut.blocks()), threads,
                         gradient_bytes<ranks>(stages_of(launch.capability)), launch.stream, kernel);
}

template <class T>
cudaError_t launch_gradient(const GradientKernel& kernel, const Launch& launch) {
    return kernel.cut.ranks == 16 ? launch_gradient<T, 16>(kernel, launch) : launch_gradient<T, 32>(kernel, launch);
}

// --- dA pass ---

struct InputKernel {
    Wide x;
    const float* dS;
    int rank;
    Cut cut;
    DeviceDropout dropout;
    Partials dA;  // over the row chunks
};

template <class T>
__device__ __forceinline__ void drop_group(const DeviceDropout& dropout, const Philox& philox, int row, int column,
                                           T* group) {
    const uint4 draws[2] = {philox(row, column / 4), philox(row, column / 4 + 1)};
    uint4 word = *reinterpret_cast<uint4*>(group);
    std::uint32_t pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint4& draw = draws[i / 2];
        const std::uint32_t low = i % 2 ? draw.z : draw.x, high = i % 2 ? draw.w : draw.y;
        pairs[i] &= (kept(dropout, low) ? 0x0000ffffu : 0u) | (kept(dropout, high) ? 0xffff0000u : 0u);
    }
    *reinterpret_cast<uint4*>(group) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <class T, int ranks>
__global__ void __launch_bounds__(threads, input_blocks) input_kernel(InputKernel kernel) {
    if constexpr (has_kernels<T>) {
        PYADAPT_DYNAMIC_SHARED(shared);
        const Place place = place_of_block<ranks>(kernel.cut, kernel.x.rows);
        Walk<T, ranks> walk(kernel.x, kernel.dS, kernel.rank, place, shared);
        walk.start();
        const bool drops = kernel.dropout.threshold > 0;
        Philox philox = {};
        if (drops) philox = philox_of(kernel.dropout);
        for (int tile = 0; tile < walk.tiles; ++tile) {
            walk.wait();
            if (drops)
                walk.for_own_groups(tile, [&](int row, T* group) {
                    drop_group(kernel.dropout, philox, row, place.column + walk.own_column, group);
                });
            __syncthreads();
            walk.load_ahead(tile);
            walk.add_tile(tile);
            walk.store_small(tile + 1);
        }
        walk.for_sums([&](int k, int j, float sum) {
            kernel.dA.store(place.row_chunk, static_cast<std::int64_t>(j) * kernel.x.columns + k, sum);
        });
    }
}

struct InputSum {
    Cut cut;
    AddPartials dA;
};

InputSum input_sum(const InputPass& pass, const Launch& launch) {
    const Cut cut = cut_product(pass.M, pass.K, pass.rank, slots(launch, input_blocks));
    const std::int64_t count = static_cast<std::int64_t>(pass.rank) * pass.K;
    const auto* workspace = static_cast<const float*>(pass.workspace);
    return {cut, {workspace, cut.row_chunks, count, pass.dropout.scale, pass.dA, pass.dA_dtype}};
}

template <class T, int ranks>
cudaError_t launch_input(const InputKernel& kernel, const Launch& launch) {
    return launch_kernel(input_kernel<T, ranks>, dim3(kernel.cut.blocks()), threads,
                         walk_bytes<ranks>(stages_of(launch.capability)), launch.stream, kernel);
}

template <class T>
cudaError_t launch_input(const InputKernel& kernel, const Launch& launch) {
    return kernel.cut.ranks == 16 ? launch_input<T, 16>(kernel, launch) : launch_input<T, 32>(kernel, launch);
}

bool supported(DType dtype, const Launch& launch) { return dtype == DType::f16 || launch.capability >= 80; }

}  // namespace

std::size_t gradient_pass_workspace(const GradientPass& pass, const Launch& launch) {
    const GradientSums sums = gradient_sums(pass, launch);
    return partial_bytes(sums.dS.chunks, sums.dS.count) + partial_bytes(sums.dB.chunks, sums.dB.count);
}

cudaError_t gradient_pass(const GradientPass& pass, const Launch& launch) {
    if (!supported(pass.dtype, launch)) return cudaErrorNotSupported;
    if (pass.rank == 0 && !pass.scaled_g) return cudaSuccess;
    const GradientSums sums = gradient_sums(pass, launch);
    GradientKernel kernel;
    kernel.g = wide_matrix(pass.g, pass.g_stride, pass.M, pass.N);
    kernel.B = pass.B;
    kernel.S = pass.S;
    kernel.rank = pass.rank;
    kernel.cut = sums.cut;
    kernel.dS = first_stage(sums.dS);
    kernel.dB = first_stage(sums.dB);
    kernel.g_scale = pass.g_scale;
    kernel.g_factor = pass.g_factor;
    kernel.scaled_g = pass.scaled_g;
    kernel.scaled_vector = wide_matrix(pass.scaled_g, pass.N, pass.M, pass.N).vector;
    const cudaError_t error = pass.dtype == DType::f16 ? launch_gradient<__half>(kernel, launch)
                                                       : launch_gradient<__nv_bfloat16>(kernel, launch);
    if (error != cudaSuccess) return error;
    const cudaError_t dS_error = add_partials(sums.dS, launch);
    return dS_error != cudaSuccess ? dS_error : add_partials(sums.dB, launch);
}

std::size_t input_pass_workspace(const InputPass& pass, const Launch& launch) {
    const InputSum sum = input_sum(pass, launch);
    return partial_bytes(sum.dA.chunks, sum.dA.count);
}

cudaError_t input_pass(const InputPass& pass, const Launch& launch) {
    if (!supported(pass.dtype, launch)) return cudaErrorNotSupported;
    if (pass.rank == 0 || pass.K == 0) return cudaSuccess;
    const InputSum sum = input_sum(pass, launch);
    InputKernel kernel;
    kernel.x = wide_matrix(pass.x, pass.x_stride, pass.M, pass.K);
    kernel.dS = pass.dS;
    kernel.rank = pass.rank;
    kernel.cut = sum.cut;
    kernel.dropout = pass.dropout;
    kernel.dA = first_stage(sum.dA);
    const cudaError_t error = pass.dtype == DType::f16 ? launch_input<__half>(kernel, launch)
                                                       : launch_input<__nv_bfloat16>(kernel, launch);
    return error != cudaSuccess ? error : add_partials(sum.dA, launch);
}

}  // namespace pyadapt::cuda
