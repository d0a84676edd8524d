// What the sanitizers have to be told: which stack a fiber runs on, and what orders the accesses of two CUDA threads.
// Without a sanitizer every function here is empty.
//
// To ThreadSanitizer each CUDA thread is a thread of its own, and a switch of fibers orders nothing. Only release() and
// acquire(), which the barriers call, do; so two accesses of shared memory without a barrier between them are a race.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The runtime's own bookkeeping is shared by all fibers on purpose, and no finding.
#if defined(__SANITIZE_THREAD__)
#define PYADAPT_BOOKKEEPING __attribute__((no_sanitize("thread"), noinline))
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
#define PYADAPT_BOOKKEEPING
#endif

// Arithmetic on operands that have been handed over: there is nothing in it to find, and it is most of the time. What
// it calls has to be always_inline, or is sanitized.
#define PYADAPT_ARITHMETIC \
    __attribute__((no_sanitize("thread"), no_sanitize("address"), no_sanitize("undefined"), noinline, optimize("O3")))

namespace pyadapt::emulator {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t stack_bytes = 256 * 1024;
#else
constexpr std::size_t stack_bytes = 64 * 1024;
#endif

inline void acquire([[maybe_unused]] void* order) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(order);
#endif
}

inline void release([[maybe_unused]] void* order) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(order);
#endif
}

// While one lives, its fiber's accesses are nobody's race.
struct Unobserved {
#if defined(__SANITIZE_THREAD__)
    Unobserved() {
        AnnotateIgnoreReadsBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
    }
    ~Unobserved() {
        AnnotateIgnoreWritesEnd("", 0);
        AnnotateIgnoreReadsEnd("", 0);
    }
#else
    Unobserved() {}
#endif
    Unobserved(const Unobserved&) = delete;
    Unobserved& operator=(const Unobserved&) = delete;
};

// Memory that nothing may touch, or may again.
inline void forbid([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory, bytes);
#endif
}

inline void allow([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace pyadapt::emulator
