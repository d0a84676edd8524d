// The kernels that have been translated from PTX, each for one architecture, for the launches of cudart.cpp.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace pyadapt::emulator {

struct KernelParameter {
    std::size_t offset, bytes;  // in the parameter block
};

struct TranslatedKernel {
    int target;  // 80 for sm_80
    std::string name;
    void (*run)(const unsigned char* parameters);
    std::vector<KernelParameter> parameters;
    std::size_t parameter_bytes;
    int max_threads;  // of __launch_bounds__, 0: none
    std::size_t static_shared;
};

// Filled before main() and read from then on.
inline std::vector<TranslatedKernel>& kernel_table() {
    static std::vector<TranslatedKernel> table;
    return table;
}

namespace ptx {

struct Registration {
    explicit Registration(TranslatedKernel kernel) { kernel_table().push_back(std::move(kernel)); }
};

}  // namespace ptx

}  // namespace pyadapt::emulator
