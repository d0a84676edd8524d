// The state of the one block that runs: its threads, its warps, its shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "context.hpp"

namespace pyadapt::emulator {

constexpr int lanes = 32;
constexpr int most_threads = 1024;
constexpr std::size_t deposit_bytes = 64;  // what a lane hands over at most: an mma's accumulators and both operands

// A dim3 or uint3 of CUDA.
struct Extent {
    unsigned x = 1, y = 1, z = 1;
    unsigned count() const { return x * y * z; }
};

// Where threads wait for each other, used again and again.
//
// ThreadSanitizer's order hangs on `order[generation % 2]`: were it one address, a thread that is slow to leave would
// acquire what a fast one has released for the next time.
struct Meeting {
    int arrived = 0;
    unsigned generation = 0;
    char order[2] = {};
};

struct Warp {
    alignas(64) unsigned char given[lanes * deposit_bytes];
    alignas(64) unsigned char taken[lanes * deposit_bytes];
    int lanes_at_start = 0, alive = 0;
    Meeting meeting;
    const char* instruction = nullptr;  // that the lanes who have arrived are executing
    unsigned barrier_generation = ~0u;  // of the barrier that a lane of this warp has reached last,
    int barrier_site = 0;               // and where
};

// One copy_async that has been issued and has not arrived.
struct AsyncCopy {
    unsigned char* to;
    const unsigned char* from;
    int bytes, bytes_from_source;  // zeros fill the rest
    int group;
};

struct Thread {
    Extent index{0, 0, 0};
    int linear = 0, lane = 0;
    Warp* warp = nullptr;
    bool done = true;
    const unsigned* waits_on = nullptr;  // a generation, which has to change from this:
    unsigned generation = 0;
    const char* waits_in = nullptr;
    std::vector<AsyncCopy> copies;
    int closed_groups = 0;

    Context context;
    unsigned char* stack = nullptr;
    void* race_fiber = nullptr;   // ThreadSanitizer's
    void* fake_stack = nullptr;   // AddressSanitizer's
    bool started = false;         // the fiber waits in its loop for another block
};

struct Block {
    Extent grid, size, index;
    std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch; the first size.count() run
    std::vector<Warp> warps;
    int alive = 0;
    Meeting barrier;

    std::unique_ptr<unsigned char[]> shared_allocation;
    unsigned char* shared = nullptr;
    std::size_t shared_bytes = 0;

    void (*function)(void*) = nullptr;
    void* argument = nullptr;

    bool failed = false;
    std::string failure;
    char start_order = 0, end_order = 0;
    Context main;
    void* main_race_fiber = nullptr;
    void* main_fake_stack = nullptr;
    const void* main_stack = nullptr;
    std::size_t main_stack_bytes = 0;
};

inline Block& block = *new Block;  // never destroyed: its fibers are not, either
inline Thread* current = nullptr;  // the fiber that runs, if one does

// Whether the launch under way, if there is one, is this host thread's.
inline thread_local bool launching_here = false;

}  // namespace pyadapt::emulator
