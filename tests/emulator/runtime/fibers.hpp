// CUDA threads as fibers of one host thread: a launch runs its blocks one after another, each thread of a block until
// it waits for others.
//
//   launch(grid, size, shared_bytes, function)   function() once a thread; current and block say which one it is
//   barrier(site)                                __syncthreads, of all that have not exited; `site` tells calls apart
//   wait(meeting, name)                          stop until the meeting's generation changes
//   fail(what)                                   failure.hpp
//   set_order(order, seed), set_order_from_environment()
//
// Orders: forward and reverse run one warp, lane by lane, until all of it waits for other warps, which is as far ahead
// as one warp can get on a GPU; random takes warps and lanes by chance. The environment variable
// PYADAPT_EMULATOR_ORDER says forward, reverse or random.
//
// launch() may be called from any thread; launches exclude each other. Where failure_handler returns, launch() throws
// Failure, and the fibers of that launch are never resumed: what they hold on their stacks is lost.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "block.hpp"
#include "counters.hpp"
#include "failure.hpp"
#include "sanitizers.hpp"

namespace pyadapt::emulator {

enum class Order { forward, reverse, random };

struct Schedule {
    Order order = Order::forward;
    std::uint64_t state = 1;

    // xorshift64*; a better generator would find no more.
    unsigned draw() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return static_cast<unsigned>((state * 0x2545F4914F6CDD1Dull) >> 32);
    }
};

inline Schedule schedule;

inline void set_order(Order order, std::uint64_t seed = 1) { schedule = {order, seed * 0x9E3779B97F4A7C15ull | 1}; }

inline void set_order_from_environment() {
    const char* name = std::getenv("PYADAPT_EMULATOR_ORDER");
    if (!name || !std::strcmp(name, "forward")) set_order(Order::forward);
    else if (!std::strcmp(name, "reverse")) set_order(Order::reverse);
    else if (!std::strcmp(name, "random")) set_order(Order::random);
    else fail(std::string("PYADAPT_EMULATOR_ORDER is '") + name + "', not forward, reverse or random");
}

namespace detail {

// From the running fiber to the scheduler, and back when the scheduler picks it again.
PYADAPT_BOOKKEEPING inline void leave_fiber() {
    Thread& self = *current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&self.fake_stack, block.main_stack, block.main_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(block.main_race_fiber, 1);
#endif
    switch_context(self.context, block.main);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self.fake_stack, &block.main_stack, &block.main_stack_bytes);
#endif
}

PYADAPT_BOOKKEEPING inline void enter_fiber(Thread& thread) {
    current = &thread;
    ++counters.switches;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.main_fake_stack, thread.stack, stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(thread.race_fiber, 1);
#endif
    switch_context(block.main, thread.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block.main_fake_stack, nullptr, nullptr);
#endif
    current = nullptr;
}

}  // namespace detail

[[noreturn]] PYADAPT_BOOKKEEPING inline void fail(const std::string& what) {
    const bool in_kernel = launching_here && current;
    std::string where = what;
    if (in_kernel)
        where += " (block " + std::to_string(block.index.x) + "," + std::to_string(block.index.y) + "," +
                 std::to_string(block.index.z) + " thread " + std::to_string(current->linear) + ")";
    failure_handler(where);
    if (!in_kernel) throw Failure(where);
    block.failed = true;
    block.failure = where;
    detail::leave_fiber();
    std::abort();
}

PYADAPT_BOOKKEEPING inline void wait(Meeting& meeting, const char* name) {
    current->waits_on = &meeting.generation;
    current->generation = meeting.generation;
    current->waits_in = name;
    detail::leave_fiber();
}

namespace detail {

PYADAPT_BOOKKEEPING inline void open_barrier_if_complete() {
    if (block.alive > 0 && block.barrier.arrived == block.alive) {
        block.barrier.arrived = 0;
        ++block.barrier.generation;
        ++counters.barriers;
    }
}

PYADAPT_BOOKKEEPING inline void finish_thread() {
    Thread& self = *current;
    if (!self.copies.empty()) fail("a thread exited with copy_async still in flight");
    if (self.warp->meeting.arrived > 0)
        fail(std::string("divergence: a lane exited while others of its warp wait in ") + self.warp->instruction);
    self.done = true;
    --block.alive;
    --self.warp->alive;
    open_barrier_if_complete();
}

// What a fiber runs: one block's function after another, for as long as the process lives.
PYADAPT_BOOKKEEPING inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.main_stack, &block.main_stack_bytes);
#endif
    for (;;) {
        acquire(&block.start_order);
        block.function(block.argument);
        release(&block.end_order);
        finish_thread();
        leave_fiber();
    }
}

inline void make_thread(Thread& thread) {
    constexpr std::size_t guard = 4096;  // an overrun stack is a fault at once, not someone else's memory
    if (!thread.stack) {
        void* memory = mmap(nullptr, stack_bytes + guard, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for the stacks of the fibers");
        mprotect(memory, guard, PROT_NONE);
        thread.stack = static_cast<unsigned char*>(memory) + guard;
    }
    if (thread.started) return;
    prepare(thread.context, thread.stack, stack_bytes, fiber_entry);
#if defined(__SANITIZE_THREAD__)
    if (!thread.race_fiber) thread.race_fiber = __tsan_create_fiber(0);
#endif
    thread.fake_stack = nullptr;
    thread.started = true;
}

// Guard zones around the block's shared memory, filled like it with NaN: a stray read gives NaN, a stray write is seen.
constexpr std::size_t shared_guard = 1024;
constexpr std::size_t shared_alignment = 128;  // of PYADAPT_DYNAMIC_SHARED, and no more than that
constexpr unsigned char poison = 0xFF;

// A new allocation for each block: to ThreadSanitizer, and to a pointer kept from the last block, it is new memory.
inline void make_shared_memory(std::size_t bytes) {
    const std::size_t room = bytes + 2 * shared_guard + 2 * shared_alignment;
    block.shared_allocation.reset(new unsigned char[room]);
    std::memset(block.shared_allocation.get(), poison, room);
    const auto first = reinterpret_cast<std::uintptr_t>(block.shared_allocation.get() + shared_guard);
    std::uintptr_t start = (first + shared_alignment - 1) / shared_alignment * shared_alignment;
    if (start % (2 * shared_alignment) == 0) start += shared_alignment;
    block.shared = reinterpret_cast<unsigned char*>(start);
    block.shared_bytes = bytes;
    forbid(block.shared - shared_guard, shared_guard);
    forbid(block.shared + bytes, shared_guard);
}

inline void check_guards() {
    const unsigned char* before = block.shared - shared_guard;
    const unsigned char* behind = block.shared + block.shared_bytes;
    allow(before, shared_guard);
    allow(behind, shared_guard);
    for (std::size_t i = 0; i < shared_guard; ++i)
        if (before[i] != poison || behind[i] != poison) fail("a write outside the block's shared memory");
}

inline void start_block(Extent index) {
    block.index = index;
    const int threads = static_cast<int>(block.size.count());
    block.warps.assign((threads + lanes - 1) / lanes, Warp{});
    block.alive = threads;
    block.barrier = {};
    for (int i = 0; i < threads; ++i) {
        Thread& thread = *block.threads[i];
        const unsigned linear = i, x = block.size.x, y = block.size.y;
        thread.index = {linear % x, linear / x % y, linear / (x * y)};
        thread.linear = i;
        thread.lane = i % lanes;
        thread.warp = &block.warps[i / lanes];
        ++thread.warp->lanes_at_start;
        ++thread.warp->alive;
        thread.done = false;
        thread.waits_on = nullptr;
        thread.copies.clear();
        thread.closed_groups = 0;
    }
}

// Each lane of a warp that can run, once. Whether any could.
PYADAPT_BOOKKEEPING inline bool run_warp(int warp) {
    const int first = warp * lanes;
    const bool random = schedule.order == Order::random;
    const unsigned odd = random ? schedule.draw() | 1 : 1, shift = random ? schedule.draw() : 0;
    bool progress = false;
    for (unsigned i = 0; i < lanes; ++i) {
        const int lane = static_cast<int>((schedule.order == Order::reverse ? lanes - 1 - i : i * odd + shift) % lanes);
        if (lane >= block.warps[warp].lanes_at_start) continue;
        Thread& thread = *block.threads[first + lane];
        if (thread.done || (thread.waits_on && *thread.waits_on == thread.generation)) continue;
        thread.waits_on = nullptr;
        progress = true;
        enter_fiber(thread);
        if (block.failed) return false;
    }
    return progress;
}

inline std::string who_waits() {
    std::map<std::string, int> waiting;
    for (unsigned i = 0; i < block.size.count(); ++i)
        if (!block.threads[i]->done) ++waiting[block.threads[i]->waits_in];
    std::string text;
    for (const auto& [name, threads] : waiting)
        text += (text.empty() ? "" : ", ") + std::to_string(threads) + " in " + name;
    return text;
}

inline void run_block() {
    const int warps = static_cast<int>(block.warps.size());
    while (block.alive > 0) {
        bool progress = false;
        for (int i = 0; i < warps && !block.failed; ++i) {
            if (schedule.order == Order::random)
                progress |= run_warp(static_cast<int>(schedule.draw() % warps));
            else
                while (run_warp(schedule.order == Order::reverse ? warps - 1 - i : i)) progress = true;
        }
        // By chance, the warps that can run were all left out.
        for (int i = 0; i < warps && !progress && !block.failed; ++i) progress = run_warp(i);
        if (block.failed) throw Failure(block.failure);
        if (!progress)
            fail("deadlock: of " + std::to_string(block.size.count()) + " threads, " +
                 std::to_string(block.size.count() - block.alive) + " have exited, and these wait: " + who_waits());
    }
}

// Leaves the runtime ready for another launch, whether this one ended well or not.
struct Launching {
    std::unique_lock<std::mutex> lock;

    static std::mutex& exclusive() {
        static std::mutex mutex;
        return mutex;
    }

    Launching() {
        if (launching_here) fail("a launch from inside a kernel");
        lock = std::unique_lock(exclusive());
        launching_here = true;
        block.failed = false;
#if defined(__SANITIZE_THREAD__)
        block.main_race_fiber = __tsan_get_current_fiber();
#endif
        release(&block.start_order);
    }

    ~Launching() {
        acquire(&block.end_order);
        launching_here = false;
        for (const auto& thread : block.threads)
            if (!thread->done) {
                thread->started = false;  // abandoned somewhere inside the kernel: start anew on the same stack
                thread->done = true;
            }
        block.shared_allocation.reset();
        block.shared = nullptr;
        block.shared_bytes = 0;
    }
};

inline void launch(Extent grid, Extent size, std::size_t shared_bytes, void (*function)(void*), void* argument) {
    const unsigned threads = size.count();
    if (threads == 0 || threads > most_threads || size.x > most_threads || size.y > most_threads)
        fail("a launch of " + std::to_string(threads) + " threads a block");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
        fail("a launch of a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
             std::to_string(grid.z) + " blocks");
    Launching launching;
    const Unobserved unobserved;
    block.grid = grid;
    block.size = size;
    block.function = function;
    block.argument = argument;
    while (block.threads.size() < threads) block.threads.push_back(std::make_unique<Thread>());
    for (unsigned i = 0; i < threads; ++i) make_thread(*block.threads[i]);
    ++counters.launches;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                ++counters.blocks;
                start_block({x, y, z});
                make_shared_memory(shared_bytes);
                run_block();
                check_guards();
            }
}

}  // namespace detail

template <class Function>
void launch(Extent grid, Extent size, std::size_t shared_bytes, Function&& function) {
    using F = std::remove_reference_t<Function>;
    detail::launch(grid, size, shared_bytes, [](void* f) { (*static_cast<F*>(f))(); },
                   const_cast<void*>(static_cast<const void*>(&function)));
}

PYADAPT_BOOKKEEPING inline void barrier(int site = 0) {
    Meeting& meeting = block.barrier;
    Warp& warp = *current->warp;
    if (warp.meeting.arrived > 0)
        fail(std::string("divergence: a lane is at __syncthreads, others of its warp in ") + warp.instruction);
    if (warp.barrier_generation != meeting.generation) {
        warp.barrier_generation = meeting.generation;
        warp.barrier_site = site;
    } else if (warp.barrier_site != site) {
        fail("divergence: lanes of one warp at different __syncthreads, lines " + std::to_string(warp.barrier_site) +
             " and " + std::to_string(site));
    }
    char* order = &meeting.order[meeting.generation % 2];
    release(order);
    ++meeting.arrived;
    if (meeting.arrived == block.alive) detail::open_barrier_if_complete();
    else wait(meeting, "__syncthreads");
    acquire(order);
}

}  // namespace pyadapt::emulator
