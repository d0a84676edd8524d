// A stand-in for the CUDA runtime: as much of it as nvcc's host objects and csrc/cuda use. Device memory is host memory, a
// launch runs the kernel translated from PTX at once, and every stream is idle.
//
// Launches are checked as a driver does. What goes wrong inside a kernel makes the launch fail, with its text kept for
// emulator_last_failure(); the process goes on, and so does the device, which on a GPU it would not.
//
// The emulator_* functions at the end choose what is emulated and say what happened; tests call them through ctypes.
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fibers.hpp"
#include "kernel_table.hpp"

namespace {

using namespace pyadapt::emulator;

constexpr int devices = 2;
constexpr int default_shared = 48 * 1024;
constexpr std::size_t records_kept = 4096;

// --- what is emulated ---

int capability = 80;
int multiprocessors = 4;
cudaError_t next_launch = cudaSuccess;

// Shared memory that a block can have when it asks for it: CUDA C++ Programming Guide, compute capabilities.
int shared_limit() {
    if (capability < 75) return default_shared;
    if (capability == 75) return 64 * 1024;
    if (capability == 80 || capability == 87) return 163 * 1024;
    if (capability == 90 || capability / 10 == 10 || capability / 10 == 11) return 227 * 1024;
    return 99 * 1024;
}

// --- what happened ---

struct Record {
    std::string kernel;
    dim3 grid, size;
    std::size_t shared;
    Counters counts;
};

std::deque<Record> records;
std::string last_failure, report;
thread_local cudaError_t last_error = cudaSuccess;
thread_local int current_device = 0;

cudaError_t give(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// One mutex for everything above and below: launches exclude each other anyway.
std::recursive_mutex& exclusive() {
    static std::recursive_mutex mutex;
    return mutex;
}
using Lock = std::lock_guard<std::recursive_mutex>;

// --- functions ---

// A kernel as the host knows it.
struct Function {
    std::string name;
    std::map<int, int> dynamic_limit;  // by device, where cudaFuncSetAttribute has set it
};

std::map<const void*, Function>& functions() {
    static std::map<const void*, Function> table;
    return table;
}

Function* find_function(const void* host) {
    const auto found = functions().find(host);
    return found == functions().end() ? nullptr : &found->second;
}

// The newest translation that this capability can run.
const TranslatedKernel* find_kernel(const std::string& name) {
    const TranslatedKernel* best = nullptr;
    for (const TranslatedKernel& kernel : kernel_table())
        if (kernel.name == name && kernel.target <= capability && (!best || kernel.target > best->target))
            best = &kernel;
    return best;
}

std::string demangled(const std::string& name) {
    int status = 0;
    char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    std::string result = status == 0 ? text : name;
    std::free(text);
    return result;
}

// --- launching ---

cudaError_t check_launch(const TranslatedKernel& kernel, const Function& function, dim3 grid, dim3 size,
                         std::size_t shared) {
    const auto threads = static_cast<unsigned long long>(size.x) * size.y * size.z;
    if (threads == 0 || threads > most_threads || size.x > 1024 || size.y > 1024 || size.z > 64)
        return cudaErrorInvalidConfiguration;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (kernel.max_threads > 0 && threads > static_cast<unsigned>(kernel.max_threads)) return cudaErrorInvalidValue;
    const auto set = function.dynamic_limit.find(current_device);
    const std::size_t limit = set == function.dynamic_limit.end() ? default_shared - kernel.static_shared
                                                                  : static_cast<std::size_t>(set->second);
    return shared > limit ? cudaErrorInvalidValue : cudaSuccess;
}

// The error that a driver would give for what went wrong in a kernel.
cudaError_t error_of(const std::string& failure) {
    const auto says = [&](const char* words) { return failure.find(words) != std::string::npos; };
    if (says("not a multiple of")) return cudaErrorMisalignedAddress;
    if (says("outside")) return cudaErrorIllegalAddress;
    return cudaErrorLaunchFailure;
}

cudaError_t run(const TranslatedKernel& kernel, dim3 grid, dim3 size, void** arguments, std::size_t shared) {
    std::vector<std::uint64_t> block((kernel.parameter_bytes + 7) / 8 + 1);
    auto* parameters = reinterpret_cast<unsigned char*>(block.data());
    for (std::size_t i = 0; i < kernel.parameters.size(); ++i)
        std::memcpy(parameters + kernel.parameters[i].offset, arguments[i], kernel.parameters[i].bytes);
    const std::string name = demangled(kernel.name);
    counters = {};
    cudaError_t error = cudaSuccess;
    failure_handler = throw_from_launch;
    try {
        launch({grid.x, grid.y, grid.z}, {size.x, size.y, size.z}, kernel.static_shared + shared,
               [&] { kernel.run(parameters); });
    } catch (const std::exception& failure) {
        last_failure = name + ": " + failure.what();
        error = error_of(failure.what());
    }
    records.push_back({name, grid, size, shared, counters});
    if (records.size() > records_kept) records.pop_front();
    return error;
}

cudaError_t launch_function(const void* host, dim3 grid, dim3 size, void** arguments, std::size_t shared) {
    const Lock lock(exclusive());
    const Function* function = find_function(host);
    if (!function) return give(cudaErrorInvalidDeviceFunction);
    if (next_launch != cudaSuccess) return give(std::exchange(next_launch, cudaSuccess));
    const TranslatedKernel* kernel = find_kernel(function->name);
    if (!kernel) return give(cudaErrorNoKernelImageForDevice);
    const cudaError_t refused = check_launch(*kernel, *function, grid, size, shared);
    if (refused != cudaSuccess) return give(refused);
    return give(run(*kernel, grid, size, arguments, shared));
}

// <<<...>>> leaves its arguments here for the stub that it calls.
struct Configuration {
    dim3 grid, size;
    std::size_t shared;
    cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

struct ErrorText {
    cudaError_t error;
    const char *name, *text;
};
constexpr ErrorText error_texts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};

}  // namespace

extern "C" {

// --- what nvcc's host objects call ---

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    const Lock lock(exclusive());
    functions()[host] = {name, {}};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 size, std::size_t shared, CUstream_st* stream) {
    configurations.push_back({grid, size, shared, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* size, std::size_t* shared, void* stream) {
    if (configurations.empty()) return give(cudaErrorInvalidConfiguration);
    const Configuration last = configurations.back();
    configurations.pop_back();
    *grid = last.grid;
    *size = last.size;
    *shared = last.shared;
    *static_cast<cudaStream_t*>(stream) = last.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    const Lock lock(exclusive());
    if (!find_function(host)) return give(cudaErrorInvalidDeviceFunction);
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 size, void** arguments, std::size_t shared,
                             cudaStream_t) {
    return launch_function(host, grid, size, arguments, shared);
}
cudaError_t cudaLaunchKernel_ptsz(const void* host, dim3 grid, dim3 size, void** arguments, std::size_t shared,
                                  cudaStream_t) {
    return launch_function(host, grid, size, arguments, shared);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 size, void** arguments, std::size_t shared,
                               cudaStream_t) {
    return launch_function(kernel, grid, size, arguments, shared);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 size, void** arguments, std::size_t shared,
                                    cudaStream_t) {
    return launch_function(kernel, grid, size, arguments, shared);
}

// --- what csrc/cuda calls ---

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
    const Lock lock(exclusive());
    Function* function = find_function(host);
    if (!function) return give(cudaErrorInvalidDeviceFunction);
    const TranslatedKernel* kernel = find_kernel(function->name);
    if (!kernel) return give(cudaErrorNoKernelImageForDevice);
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    const bool fits = value >= 0 && static_cast<std::size_t>(value) + kernel->static_shared <=
                                        static_cast<std::size_t>(shared_limit());
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || !fits) return give(cudaErrorInvalidValue);
    function->dynamic_limit[current_device] = value;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
    for (const ErrorText& entry : error_texts)
        if (entry.error == error) return entry.name;
    return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
    for (const ErrorText& entry : error_texts)
        if (entry.error == error) return entry.text;
    return "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = devices;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices) return give(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= devices) return give(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
        case cudaDevAttrMultiProcessorCount: *value = multiprocessors; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = default_shared; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_limit(); break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_limit() + 1024; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = most_threads; break;
        case cudaDevAttrWarpSize: *value = lanes; break;
        case cudaDevAttrL2CacheSize: *value = 4 << 20; break;
        default: return give(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    *attributes = {};
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = current_device;
    attributes->devicePointer = const_cast<void*>(pointer);
    return cudaSuccess;
}

// --- for the tests ---

#define EMULATOR_API __attribute__((visibility("default")))

// The kernels are built from PTX of compute_75 and compute_80; the newest that the capability can run is taken.
EMULATOR_API void emulator_set_capability(int value) {
    const Lock lock(exclusive());
    capability = value;
    for (auto& [host, function] : functions()) function.dynamic_limit.clear();
}
EMULATOR_API int emulator_capability() { return capability; }

EMULATOR_API void emulator_set_multiprocessors(int value) { multiprocessors = value; }

// 0 forward, 1 reverse, 2 random.
EMULATOR_API void emulator_set_order(int order, unsigned long long seed) {
    const Lock lock(exclusive());
    set_order(static_cast<Order>(order), seed);
}

// The next launch gives this error and runs nothing.
EMULATOR_API void emulator_fail_next_launch(int error) {
    const Lock lock(exclusive());
    next_launch = static_cast<cudaError_t>(error);
}

// What the last failure inside a kernel was; empty where there was none since emulator_reset().
EMULATOR_API const char* emulator_last_failure() { return last_failure.c_str(); }

// Forget launches, failures and errors.
EMULATOR_API void emulator_reset() {
    const Lock lock(exclusive());
    records.clear();
    last_failure.clear();
    last_error = next_launch = cudaSuccess;
}

// Launch a translated kernel by its name, as one that may have all the shared memory there is.
EMULATOR_API int emulator_launch(const char* name, const unsigned* grid, const unsigned* size, void** arguments,
                                 std::size_t shared) {
    const Lock lock(exclusive());
    const TranslatedKernel* kernel = find_kernel(name);
    if (!kernel) return give(cudaErrorNoKernelImageForDevice);
    const dim3 grid_size(grid[0], grid[1], grid[2]), block_size(size[0], size[1], size[2]);
    const Function function = {name, {{current_device, shared_limit()}}};
    const cudaError_t refused = check_launch(*kernel, function, grid_size, block_size, shared);
    return give(refused != cudaSuccess ? refused : run(*kernel, grid_size, block_size, arguments, shared));
}

// The launches since emulator_reset(), oldest first, as JSON; valid until the next call.
EMULATOR_API const char* emulator_launches() {
    const Lock lock(exclusive());
    const auto extent = [](dim3 d) {
        return "[" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + "]";
    };
    report = "[";
    for (const Record& r : records) {
        const std::pair<const char*, long> counts[] = {
            {"blocks", r.counts.blocks},           {"barriers", r.counts.barriers},
            {"mma", r.counts.mma},                 {"ldmatrix", r.counts.ldmatrix},
            {"async_copies", r.counts.async_copies}, {"ldmatrix_conflicts", r.counts.ldmatrix_conflicts},
        };
        report += (report.size() > 1 ? ", " : "") + std::string("{\"kernel\": \"") + r.kernel + "\", \"grid\": " +
                  extent(r.grid) + ", \"block\": " + extent(r.size) + ", \"shared\": " + std::to_string(r.shared);
        for (const auto& [name, count] : counts) report += std::string(", \"") + name + "\": " + std::to_string(count);
        report += "}";
    }
    report += "]";
    return report.c_str();
}

}  // extern "C"
