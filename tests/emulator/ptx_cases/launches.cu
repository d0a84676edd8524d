// Kernels and launches for the tests of the stand-in CUDA runtime; the functions at the end are called through ctypes.
#include "../../../csrc/cuda/launch.cuh"
#include "../../../csrc/cuda/primitives.cuh"

namespace {

using namespace pyadapt::cuda;

struct Work {
    const float* in;
    float* out;
    int n;
};

// out[i] = factor in[i], and behind the n elements the architecture that this was compiled for.
template <int factor>
__global__ void __launch_bounds__(256) scale_kernel(Work work) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < work.n) work.out[i] = static_cast<float>(factor) * work.in[i];
    if (i == 0) work.out[work.n] = static_cast<float>(PYADAPT_ARCH);
}

// The sum of in, each thread having put its element into shared memory.
__global__ void sum_kernel(Work work) {
    PYADAPT_DYNAMIC_SHARED(shared);
    auto* values = reinterpret_cast<float*>(shared);
    values[threadIdx.x] = work.in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x > 0) return;
    float sum = 0;
    for (int i = 0; i < work.n; ++i) sum += values[i];
    *work.out = sum;
}

__global__ void trap_kernel(Work work) {
    if (threadIdx.x == 3) __trap();
    work.out[threadIdx.x] = 1;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int launch_scale(const float* in, float* out, int n, const unsigned* grid, unsigned threads, std::size_t shared) {
    const dim3 blocks(grid[0], grid[1], grid[2]);
    return launch_kernel(scale_kernel<2>, blocks, static_cast<int>(threads), shared, cudaStream_t{}, Work{in, out, n});
}

API int launch_chevrons(const float* in, float* out, int n) {
    scale_kernel<3><<<(n + 31) / 32, 32>>>({in, out, n});
    return cudaGetLastError();
}

// Without cudaFuncSetAttribute.
API int launch_unasked(const float* in, float* out, int n, std::size_t shared) {
    Work work{in, out, n};
    void* arguments[] = {&work};
    return cudaLaunchKernel(reinterpret_cast<const void*>(sum_kernel), dim3(1), dim3(n), arguments, shared, nullptr);
}

API int ask_for_shared(int bytes) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(sum_kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                bytes);
}

API int launch_trap(float* out) { return launch_kernel(trap_kernel, dim3(1), 32, 0, cudaStream_t{}, Work{out, out, 0}); }

API int last_error() { return cudaGetLastError(); }
API int peek_error() { return cudaPeekAtLastError(); }
API int set_device(int device) { return cudaSetDevice(device); }
API const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
API int attribute(int which, int device, int* value) {
    return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(which), device);
}
API int device_count() {
    int count = 0;
    cudaGetDeviceCount(&count);
    return count;
}
