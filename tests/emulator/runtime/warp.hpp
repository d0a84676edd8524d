// Instructions that the lanes of a warp execute together.
//
//   rendezvous<Given, Taken>("name", given, compute)   each lane hands over `given`; the last to come calls
//                                                      compute(const Given* all, Taken* all); each lane gets its Taken
//   shuffle(word, Shuffle::index, source, clamp_and_segment, valid)   shfl.sync on 32 bits, the operands of PTX
//   shuffle_index / _up / _down / _xor (word, argument)               the whole warp, as the CUDA functions do it
//   ballot(predicate), warp_barrier()
//
// Every lane that the warp started with has to take part, in the same instruction; so only the full mask is meaningful.
// None of them but warp_barrier() orders memory, and ThreadSanitizer is told so.
#pragma once

#include <cstring>
#include <string>
#include <type_traits>

#include "fibers.hpp"

namespace pyadapt::emulator {

template <class Given, class Taken, class Compute>
PYADAPT_BOOKKEEPING Taken rendezvous(const char* instruction, const Given& given, Compute compute) {
    static_assert(sizeof(Given) <= deposit_bytes && sizeof(Taken) <= deposit_bytes);
    static_assert(std::is_trivially_copyable_v<Given> && std::is_trivially_copyable_v<Taken>);
    const Unobserved unobserved;
    Warp& warp = *current->warp;
    Meeting& meeting = warp.meeting;
    const int lane = current->lane;
    if (warp.alive != warp.lanes_at_start)
        fail(std::string("divergence: lanes of the warp had exited before ") + instruction);
    if (meeting.arrived == 0) warp.instruction = instruction;
    else if (warp.instruction != instruction && std::strcmp(warp.instruction, instruction) != 0)
        fail(std::string("divergence: lanes of one warp in ") + warp.instruction + " and in " + instruction);
    __builtin_memcpy(warp.given + lane * sizeof(Given), &given, sizeof(Given));
    if (++meeting.arrived == warp.alive) {
        compute(reinterpret_cast<const Given*>(warp.given), reinterpret_cast<Taken*>(warp.taken));
        meeting.arrived = 0;
        ++meeting.generation;
    } else {
        wait(meeting, instruction);
    }
    Taken taken;
    __builtin_memcpy(&taken, warp.taken + lane * sizeof(Taken), sizeof(Taken));
    return taken;
}

// For instructions that have no meaning on part of a warp.
inline void require_full_warp(const char* instruction) {
    if (current->warp->lanes_at_start != lanes)
        fail(std::string(instruction) + " in a warp of " + std::to_string(current->warp->lanes_at_start) + " lanes");
}

enum class Shuffle { index, up, down, butterfly };

// The lane that `lane` reads, and whether it is within its segment: PTX ISA, "shfl.sync".
constexpr int shuffle_source(Shuffle mode, int lane, std::uint32_t argument, std::uint32_t clamp_and_segment,
                             bool& valid) {
    const int offset = static_cast<int>(argument & 31), clamp = static_cast<int>(clamp_and_segment & 31);
    const int segment = static_cast<int>(clamp_and_segment >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int source = lane;
    switch (mode) {
        case Shuffle::up: source = lane - offset, valid = source >= last; break;
        case Shuffle::down: source = lane + offset, valid = source <= last; break;
        case Shuffle::butterfly: source = lane ^ offset, valid = source <= last; break;
        case Shuffle::index: source = first | (offset & ~segment), valid = source <= last; break;
    }
    return valid ? source : lane;
}

inline std::uint32_t shuffle(std::uint32_t word, Shuffle mode, std::uint32_t argument, std::uint32_t clamp_and_segment,
                             bool& valid) {
    struct Given {
        std::uint32_t word;
        int source;
    };
    const int source = shuffle_source(mode, current->lane, argument, clamp_and_segment, valid);
    if (source >= current->warp->lanes_at_start) fail("shfl from a lane that the block does not have");
    static constexpr const char* names[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.bfly"};
    return rendezvous<Given, std::uint32_t>(names[static_cast<int>(mode)], {word, source},
                                            [](const Given* given, std::uint32_t* taken) {
                                                for (int i = 0; i < current->warp->lanes_at_start; ++i)
                                                    taken[i] = given[given[i].source].word;
                                            });
}

inline std::uint32_t shuffle_index(std::uint32_t word, int source) {
    bool valid;
    return shuffle(word, Shuffle::index, static_cast<std::uint32_t>(source), 31, valid);
}
inline std::uint32_t shuffle_up(std::uint32_t word, unsigned offset) {
    bool valid;
    return shuffle(word, Shuffle::up, offset, 0, valid);
}
inline std::uint32_t shuffle_down(std::uint32_t word, unsigned offset) {
    bool valid;
    return shuffle(word, Shuffle::down, offset, 31, valid);
}
inline std::uint32_t shuffle_xor(std::uint32_t word, int mask) {
    bool valid;
    return shuffle(word, Shuffle::butterfly, static_cast<std::uint32_t>(mask), 31, valid);
}

inline std::uint32_t ballot(bool predicate) {
    return rendezvous<std::uint32_t, std::uint32_t>("vote.ballot", predicate,
                                                    [](const std::uint32_t* given, std::uint32_t* taken) {
                                                        std::uint32_t votes = 0;
                                                        const int present = current->warp->lanes_at_start;
                                                        for (int i = 0; i < present; ++i) votes |= given[i] << i;
                                                        for (int i = 0; i < present; ++i) taken[i] = votes;
                                                    });
}

PYADAPT_BOOKKEEPING inline void warp_barrier() {
    Meeting& meeting = current->warp->meeting;
    char* order = &meeting.order[meeting.generation % 2];
    release(order);
    rendezvous<std::uint32_t, std::uint32_t>("__syncwarp", 0, [](const std::uint32_t*, std::uint32_t*) {});
    acquire(order);
}

}  // namespace pyadapt::emulator
