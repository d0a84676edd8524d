// Shared memory of the running block: its start, its checks, and the copies into it that happen by themselves.
//
//   shared_memory(), shared_bytes()                      aligned to 128 bytes; exactly the size asked for; NaN at first
//   shared_at(offset)                                    for code that holds shared addresses as numbers from 0 (PTX)
//   check_shared(pointer, bytes, alignment, name)        fails where an access is outside or misaligned
//   copy_async(shared, global, bytes, from_source, name) cp.async: `from_source` bytes and then zeros, `bytes` in all
//   close_async_group(), wait_async(pending)             cp.async.commit_group, cp.async.wait_group
//   wait_all_async()                                     cp.async.wait_all
//
// A copy is as unkind as one can be: its destination is lost when it is issued, and the data come when they are waited
// for, not a moment earlier.
#pragma once

#include <cstring>
#include <string>

#include "fibers.hpp"

namespace pyadapt::emulator {

inline unsigned char* shared_memory() { return block.shared; }
inline std::size_t shared_bytes() { return block.shared_bytes; }
inline unsigned char* shared_at(std::uint32_t offset) { return block.shared + offset; }

inline std::size_t shared_offset(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) - reinterpret_cast<std::uintptr_t>(block.shared);
}

inline void check_shared(const void* pointer, std::size_t bytes, std::size_t alignment, const char* name) {
    const std::size_t offset = shared_offset(pointer);  // huge where the pointer lies before the start
    if (offset > block.shared_bytes || bytes > block.shared_bytes - offset)
        fail(std::string(name) + ": " + std::to_string(bytes) + " bytes at " +
             std::to_string(static_cast<std::ptrdiff_t>(offset)) + ", outside the " +
             std::to_string(block.shared_bytes) + " bytes of shared memory");
    if (offset % alignment != 0)
        fail(std::string(name) + ": shared address " + std::to_string(offset) + " is not a multiple of " +
             std::to_string(alignment));
}

inline void check_global(const void* pointer, std::size_t alignment, const char* name) {
    if (reinterpret_cast<std::uintptr_t>(pointer) % alignment != 0)
        fail(std::string(name) + ": global address is not a multiple of " + std::to_string(alignment));
}

namespace detail {

inline void arrive(const AsyncCopy& copy) {
    std::memcpy(copy.to, copy.from, copy.bytes_from_source);
    std::memset(copy.to + copy.bytes_from_source, 0, copy.bytes - copy.bytes_from_source);
}

// The copies of groups below `group` arrive, in the order in which they were issued.
inline void arrive_before(int group) {
    auto& copies = current->copies;
    std::size_t arrived = 0;
    while (arrived < copies.size() && copies[arrived].group < group) arrive(copies[arrived++]);
    const Unobserved unobserved;
    copies.erase(copies.begin(), copies.begin() + arrived);
}

}  // namespace detail

inline void copy_async(void* shared, const void* global, int bytes, int from_source, const char* name = "cp.async") {
    check_shared(shared, bytes, bytes, name);
    check_global(global, bytes, name);
    if (from_source < 0 || from_source > bytes)
        fail(std::string(name) + " of " + std::to_string(from_source) + " bytes out of " + std::to_string(bytes));
    std::memset(shared, detail::poison, bytes);
    const Unobserved unobserved;
    ++counters.async_copies;
    current->copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes,
                               from_source, current->closed_groups});
}

inline void close_async_group() { ++current->closed_groups; }

inline void wait_async(int pending) { detail::arrive_before(current->closed_groups - pending); }

inline void wait_all_async() {
    close_async_group();
    wait_async(0);
}

}  // namespace pyadapt::emulator
