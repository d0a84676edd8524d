// Launching a kernel whose arguments are known by type, with as much dynamic shared memory as it asks for.
#pragma once

#include "primitives.cuh"

#ifndef PYADAPT_EMULATOR

#include <cuda_runtime_api.h>

#include <cstddef>

namespace pyadapt::cuda {

// What a kernel may use without asking.
constexpr std::size_t default_shared = 48 * 1024;

// The error is this launch's own: one that another library left behind is neither reported nor cleared.
template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared,
                          cudaStream_t stream, Parameters... arguments) {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared > default_shared) {
        const cudaError_t error =
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return error;
    }
    void* pointers[] = {&arguments...};
    return cudaLaunchKernel(function, grid, dim3(threads), pointers, shared, stream);
}

}  // namespace pyadapt::cuda

#endif
