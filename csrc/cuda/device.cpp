#include "device.hpp"

#include "../core/error.hpp"

namespace pyadapt::cuda {
namespace {

std::string name_of(int device) { return "cuda:" + std::to_string(device); }

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "asking for an attribute", device);
    return value;
}

}  // namespace

void check(cudaError_t error, const char* what, int device) {
    if (error == cudaSuccess) return;
    throw DeviceError(std::string(what) + " failed on " + name_of(device) + ": " + cudaGetErrorName(error) + ", " +
                      cudaGetErrorString(error));
}

Guard::Guard(int device) : device_(device), before_(device) {
    check(cudaGetDevice(&before_), "asking for the current device", device);
    if (before_ != device_) check(cudaSetDevice(device_), "choosing the device", device);
}

Guard::~Guard() {
    if (before_ != device_) cudaSetDevice(before_);
}

Launch launch_on(int device, std::uintptr_t stream) {
    return {reinterpret_cast<cudaStream_t>(stream), capability(device),
            attribute(cudaDevAttrMultiProcessorCount, device)};
}

int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int capability(int device) {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
}

void check_same_device(const std::vector<const Tensor*>& tensors) {
    const Tensor* first = nullptr;
    for (const Tensor* tensor : tensors) {
        if (!tensor) continue;
        if (!first) first = tensor;
        if (tensor->device == first->device) continue;
        throw ValueError(std::string(tensor->name) + " is on " + name_of(tensor->device) + ", but " + first->name +
                         " is on " + name_of(first->device) + "; wanted all on one device");
    }
}

}  // namespace pyadapt::cuda
