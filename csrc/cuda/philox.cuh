// The dropout mask of core/philox.hpp on the device: the same bits for one seed as on the CPU.
#pragma once

#include "../core/philox.hpp"
#include "kernels.hpp"
#include "primitives.cuh"

namespace pyadapt::cuda {

// Philox4x32-10 under one key.
struct Philox {
    std::uint32_t key[2];

    // The four draws of elements (row, 4 group .. 4 group + 3).
    __device__ __forceinline__ uint4 operator()(std::uint64_t row, std::uint32_t group) const {
        uint4 c = make_uint4(group, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32), 0);
        std::uint32_t k0 = key[0], k1 = key[1];
        constexpr std::uint32_t multiplier0 = philox::multiplier[0], multiplier1 = philox::multiplier[1];
        constexpr std::uint32_t weyl0 = philox::weyl[0], weyl1 = philox::weyl[1];
#pragma unroll
        for (int round = 0; round < philox::rounds; ++round) {
            const std::uint32_t high0 = __umulhi(multiplier0, c.x), low0 = multiplier0 * c.x;
            const std::uint32_t high1 = __umulhi(multiplier1, c.z), low1 = multiplier1 * c.z;
            c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
            k0 += weyl0;
            k1 += weyl1;
        }
        return c;
    }
};

// The generator of a dropout; its seed is read here, on the device, so that a captured graph draws new masks.
__device__ __forceinline__ Philox philox_of(const DeviceDropout& dropout) {
    if (!dropout.seed) return {{dropout.key[0], dropout.key[1]}};
    const std::uint64_t seed = static_cast<std::uint64_t>(*dropout.seed);
    return {{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}};
}

// Whether an element with this draw survives.
__device__ __forceinline__ bool kept(const DeviceDropout& dropout, std::uint32_t draw) {
    return draw >= dropout.threshold;
}

}  // namespace pyadapt::cuda
