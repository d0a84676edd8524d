// How often things happened, over all launches since the last `counters = {}`.
#pragma once

namespace pyadapt::emulator {

struct Counters {
    long launches = 0, blocks = 0, barriers = 0, switches = 0;
    long mma = 0, ldmatrix = 0, async_copies = 0;
    long ldmatrix_conflicts = 0;  // rows of one 8 x 8 matrix in the same 16-byte group of banks
};

inline Counters counters;

}  // namespace pyadapt::emulator
