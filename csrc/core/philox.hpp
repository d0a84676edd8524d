// The dropout generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
//   counter = (k / 4, m mod 2^32, m / 2^32, 0),  key = (seed mod 2^32, seed / 2^32)
//   element (m, k) is kept when lane k mod 4 of philox(counter, key) >= round(p 2^32)
//
// The mask is a pure function of (seed, m, k): forward and backward make it again, on any device, in any order. The
// plain-torch twin is pyadapt/ops/philox.py.
#pragma once

#include <cstdint>

namespace pyadapt::philox {

constexpr std::uint32_t multiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr std::uint32_t weyl[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr int rounds = 10;

}  // namespace pyadapt::philox

namespace pyadapt {

// drop(x): an element whose draw is below the threshold becomes 0, the others are multiplied by scale.
struct Dropout {
    std::uint32_t key[2];
    std::uint64_t threshold;  // round(p 2^32): 2^32 drops everything
    float scale;              // 1 / (1 - p); 0 where nothing survives
};

}  // namespace pyadapt
