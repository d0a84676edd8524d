// Switching stacks. ucontext does a system call a switch, for the signal mask, and a kernel switches millions of times;
// so x86-64 has its own: push what a called function must preserve, change the stack, pop.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(PYADAPT_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace pyadapt::emulator {

#if defined(__x86_64__) && !defined(PYADAPT_EMULATOR_UCONTEXT)

struct Context {
    void* stack_pointer = nullptr;
};

// noipa: everything in memory and every register that a call may change does change here, whatever the body shows.
__attribute__((naked, noipa, no_sanitize("thread"), no_sanitize("address"))) inline void swap_stacks(void** /*saved*/,
                                                                                                   void* /*next*/) {
    asm("pushq %rbp\n\t"
        "pushq %rbx\n\t"
        "pushq %r12\n\t"
        "pushq %r13\n\t"
        "pushq %r14\n\t"
        "pushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\t"
        "popq %r14\n\t"
        "popq %r13\n\t"
        "popq %r12\n\t"
        "popq %rbx\n\t"
        "popq %rbp\n\t"
        "ret");
}

inline void switch_context(Context& from, Context& to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }

// Make the first switch to `context` call entry(), which must not return, on this stack.
inline void prepare(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
    constexpr int preserved = 6;
    const auto top = reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t{15};
    auto* slot = reinterpret_cast<std::uint64_t*>(top);
    *--slot = 0;  // where entry would return to; it also leaves the stack pointer as a call would
    *--slot = reinterpret_cast<std::uint64_t>(entry);
    for (int i = 0; i < preserved; ++i) *--slot = 0;
    context.stack_pointer = slot;
}

#else

struct Context {
    ucontext_t state;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void prepare(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

#endif

}  // namespace pyadapt::emulator
