// Scratch memory of a kernel call.
#pragma once

#include <cstdint>

namespace pyadapt {

// At least `floats` floats, aligned to a cache line, kept by the calling thread until its next call or its end: a
// training step asks for the same few megabytes at every layer. The caller hands parts of it to its OpenMP team, so
// that running out of memory is an exception before any parallel region starts.
float* workspace(std::int64_t floats);

}  // namespace pyadapt
