// One small kernel for each primitive and built-in that the CUDA kernels are made of, so that hardware and the emulator
// can be asked the same questions. This file is compiled by nvcc for a GPU and by a host compiler for the emulator.
//
// A block is one warp, and a case a block. Operands lie in memory as (case, lane, word).
#include "cuda/element.cuh"
#include "cuda/launch.cuh"
#include "cuda/philox.cuh"

namespace pyadapt::cuda {
namespace {

struct Operands {
    const void* first;
    const void* second;
    const void* third;
    void* out;
};

constexpr int lanes = 32;

// The words of this lane.
template <class T>
__device__ __forceinline__ const T* mine(const void* data, int words) {
    return static_cast<const T*>(data) + static_cast<std::int64_t>(blockIdx.x * lanes + threadIdx.x) * words;
}
template <class T>
__device__ __forceinline__ T* mine(void* data, int words) {
    return static_cast<T*>(data) + static_cast<std::int64_t>(blockIdx.x * lanes + threadIdx.x) * words;
}

// d = c + a b of 16-bit fragments: a 4 words, b 2, c 4 floats.
template <class T>
__global__ void product_16(Operands operands) {
    std::uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = mine<std::uint32_t>(operands.first, 4)[i];
    for (int i = 0; i < 2; ++i) b[i] = mine<std::uint32_t>(operands.second, 2)[i];
    for (int i = 0; i < 4; ++i) d[i] = mine<float>(operands.third, 4)[i];
    mma_16x8x16(d, a, b, T());
    for (int i = 0; i < 4; ++i) mine<float>(operands.out, 4)[i] = d[i];
}

__global__ void product_tf32(Operands operands) {
    float a[4], b[2], d[4];
    for (int i = 0; i < 4; ++i) a[i] = mine<float>(operands.first, 4)[i];
    for (int i = 0; i < 2; ++i) b[i] = mine<float>(operands.second, 2)[i];
    for (int i = 0; i < 4; ++i) d[i] = mine<float>(operands.third, 4)[i];
    mma_16x8x8(d, a, b);
    for (int i = 0; i < 4; ++i) mine<float>(operands.out, 4)[i] = d[i];
}

__global__ void rounding(Operands operands) {
    *mine<float>(operands.out, 1) = round_tf32(*mine<float>(operands.first, 1));
}

// first: an image of shared memory, 64 bytes a lane; second: the offset in it that each lane hands over.
constexpr int image_bytes = 64 * lanes;

template <bool transposed>
__global__ void matrices(Operands operands) {
    PYADAPT_DYNAMIC_SHARED(memory);
    for (int i = 0; i < 4; ++i)
        reinterpret_cast<uint4*>(memory)[4 * threadIdx.x + i] = mine<uint4>(operands.first, 4)[i];
    __syncthreads();
    std::uint32_t r[4];
    const unsigned char* row = memory + *mine<std::uint32_t>(operands.second, 1);
    if (transposed) load_matrix_x4_transposed(r, row);
    else load_matrix_x4(r, row);
    for (int i = 0; i < 4; ++i) mine<std::uint32_t>(operands.out, 4)[i] = r[i];
}

// first: two groups of 16 bytes a lane; second: how many bytes of each are asked for. Each lane reads its neighbour's.
__global__ void copies(Operands operands) {
    PYADAPT_DYNAMIC_SHARED(memory);
    uint4* shared = reinterpret_cast<uint4*>(memory);
    const uint4* source = mine<uint4>(operands.first, 2);
    const std::uint32_t* bytes = mine<std::uint32_t>(operands.second, 2);
    copy_async_16(shared + threadIdx.x, source, static_cast<int>(bytes[0]));
    copy_async_commit();
    copy_async_16(shared + lanes + threadIdx.x, source + 1, static_cast<int>(bytes[1]));
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    mine<uint4>(operands.out, 2)[0] = shared[threadIdx.x ^ 1];
    copy_async_wait<0>();
    __syncthreads();
    mine<uint4>(operands.out, 2)[1] = shared[lanes + (threadIdx.x ^ 1)];
}

// first: a value a lane; second: the lane to read. Out: 12 words.
__global__ void exchanges(Operands operands) {
    constexpr unsigned all = 0xffffffffu;
    const std::uint32_t value = *mine<std::uint32_t>(operands.first, 1);
    const int lane = static_cast<int>(*mine<std::uint32_t>(operands.second, 1));
    std::uint32_t* out = mine<std::uint32_t>(operands.out, 12);
    *out++ = __shfl_sync(all, value, lane);
    for (int offset = 16; offset > 0; offset /= 2) *out++ = __shfl_xor_sync(all, value, offset);
    for (int offset = 16; offset > 0; offset /= 2) *out++ = __shfl_down_sync(all, value, offset);
    *out = __ballot_sync(all, static_cast<int>(value & 1));
}

// first: a seed a case; second: a lane's row (two words), group and threshold (two words). Out: the draws with the seed
// in memory, those with it as a key, and which of the first survive, a bit each.
__global__ void random_numbers(Operands operands) {
    const std::int64_t* seed = static_cast<const std::int64_t*>(operands.first) + blockIdx.x;
    const std::uint32_t* in = mine<std::uint32_t>(operands.second, 5);
    const std::uint64_t row = in[0] | static_cast<std::uint64_t>(in[1]) << 32;
    const std::uint64_t threshold = in[3] | static_cast<std::uint64_t>(in[4]) << 32;
    const std::uint64_t bits = static_cast<std::uint64_t>(*seed);
    const std::uint32_t low = static_cast<std::uint32_t>(bits), high = static_cast<std::uint32_t>(bits >> 32);
    const DeviceDropout in_memory{seed, {0, 0}, threshold, 1.0f}, as_key{nullptr, {low, high}, threshold, 1.0f};
    const uint4 first = philox_of(in_memory)(row, in[2]), second = philox_of(as_key)(row, in[2]);
    std::uint32_t* out = mine<std::uint32_t>(operands.out, 9);
    out[0] = first.x, out[1] = first.y, out[2] = first.z, out[3] = first.w;
    out[4] = second.x, out[5] = second.y, out[6] = second.z, out[7] = second.w;
    out[8] = kept(in_memory, first.x) | kept(in_memory, first.y) << 1 | kept(in_memory, first.z) << 2 |
             kept(in_memory, first.w) << 3;
}

__device__ __forceinline__ std::uint32_t word(__half x) { return pack(x, __half()) & 0xffffu; }
__device__ __forceinline__ std::uint32_t word(__nv_bfloat16 x) { return pack(x, __nv_bfloat16()) & 0xffffu; }

// first: a float; second: a word that is two fp16 or two bf16 values. Out: 7 words.
__global__ void conversions(Operands operands) {
    const float x = *mine<float>(operands.first, 1);
    const std::uint32_t pair = *mine<std::uint32_t>(operands.second, 1);
    const float2 halves = unpack<__half>(pair), bfloats = unpack<__nv_bfloat16>(pair);
    std::uint32_t* out = mine<std::uint32_t>(operands.out, 7);
    out[0] = word(from_float<__half>(x));
    out[1] = word(from_float<__nv_bfloat16>(x));
    out[2] = __float_as_uint(halves.x);
    out[3] = __float_as_uint(halves.y);
    out[4] = __float_as_uint(bfloats.x);
    out[5] = __float_as_uint(bfloats.y);
    out[6] = pack(from_float<__half>(1.0f), from_float<__half>(-2.0f));
}

// first: three floats; second: three words. Out: 8 words.
__global__ void arithmetic(Operands operands) {
    const float* x = mine<float>(operands.first, 3);
    const std::uint32_t* n = mine<std::uint32_t>(operands.second, 3);
    std::uint32_t* out = mine<std::uint32_t>(operands.out, 8);
    out[0] = __float_as_uint(fmaf(x[0], x[1], x[2]));
    out[1] = __float_as_uint(fminf(x[0], x[1]));
    out[2] = __float_as_uint(fmaxf(x[0], x[1]));
    out[3] = __float_as_uint(rintf(x[0]));
    out[4] = __float_as_uint(fabsf(x[0]));
    out[5] = __float_as_uint(x[0] / x[1]);
    out[6] = __umulhi(n[0], n[1]);
    out[7] = __byte_perm(n[0], n[1], n[2]);
}

}  // namespace
}  // namespace pyadapt::cuda

// How the tests call them: the kernel's number in this table, its operands, the cases. Gives back the launch's error.
extern "C" int run_primitive(int number, const void* first, const void* second, const void* third, void* out,
                             int cases) {
    using namespace pyadapt::cuda;
    void (*const kernels[])(Operands) = {product_16<__half>, product_16<__nv_bfloat16>, product_tf32,  rounding,
                                         matrices<false>,    matrices<true>,            copies,        exchanges,
                                         random_numbers,     conversions,               arithmetic};
    const Operands operands{first, second, third, out};
    return launch_kernel(kernels[number], dim3(static_cast<unsigned>(cases)), lanes, image_bytes, cudaStream_t{},
                         operands);
}
