// The device that a call runs on, and what is said when CUDA fails.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/tensor.hpp"
#include "kernels.hpp"

namespace pyadapt::cuda {

// CUDA refused: RuntimeError.
struct DeviceError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Throws unless `error` is success: what was done, where, and CUDA's own words.
void check(cudaError_t error, const char* what, int device);

// Makes a device the current one while it lives, and puts the former one back: torch and this module each have a runtime.
class Guard {
public:
    explicit Guard(int device);
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

private:
    int device_, before_;
};

// How to launch on a device; `stream` is torch's handle.
Launch launch_on(int device, std::uintptr_t stream);

int device_count();
// 75, 80, 86, ...
int capability(int device);

// Throws, naming both, unless all tensors lie on the first one's device; null ones are passed over.
void check_same_device(const std::vector<const Tensor*>& tensors);

}  // namespace pyadapt::cuda
