// What code translated from PTX calls (tests/emulator/ptx): semantics that C++ operators do not have, checked memory, and
// the instructions of the warp. Names follow PTX ISA, chapter 9; compile with -fwrapv, -fno-strict-aliasing and
// -ffp-contract=off.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "half.hpp"
#include "kernel_table.hpp"
#include "mma.hpp"
#include "shared.hpp"
#include "warp.hpp"

namespace pyadapt::emulator::ptx {

using emulator::BF16;
using emulator::close_async_group;
using emulator::F16;
using emulator::fail;
using emulator::mma_m16n8k16;
using emulator::mma_m16n8k8;
using emulator::mma_m16n8k8_tf32;
using emulator::Shuffle;
using emulator::wait_all_async;
using emulator::wait_async;

// A register before anything is written to it.
template <class T>
constexpr T poison = static_cast<T>(-1);
template <>
inline constexpr float poison<float> = canonical_nan;
template <>
inline constexpr double poison<double> = std::numeric_limits<double>::quiet_NaN();

// --- special registers ---

inline const Extent& thread_index() { return current->index; }
inline const Extent& block_index() { return block.index; }
inline const Extent& block_size() { return block.size; }
inline const Extent& grid_size() { return block.grid; }
inline unsigned lane() { return static_cast<unsigned>(current->lane); }
inline unsigned warp_index() { return static_cast<unsigned>(current->linear / lanes); }

// --- integers ---

template <class T>
T multiply_high(T a, T b) {
    using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                    std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
}

// Without a trap: PTX leaves a division by zero open, and the smallest number divided by -1 wraps.
template <class T>
T divide(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
    return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
}

template <class T>
T absolute(T a) {
    return a < 0 ? static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a)) : a;
}

template <class T>
T shift_left(T a, std::uint32_t n) {
    return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << n);
}
template <class T>
T shift_right(T a, std::uint32_t n) {
    return static_cast<T>(n >= 8 * sizeof(T) ? (a < 0 ? T(-1) : T(0)) : a >> n);
}

inline std::uint32_t funnel_amount(std::uint32_t n, bool wrap) { return wrap ? n & 31 : std::min(n, 32u); }
inline std::uint32_t funnel_shift_left(std::uint32_t low, std::uint32_t high, std::uint32_t n, bool wrap) {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(high) << 32 | low) << funnel_amount(n, wrap) >> 32);
}
inline std::uint32_t funnel_shift_right(std::uint32_t low, std::uint32_t high, std::uint32_t n, bool wrap) {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(high) << 32 | low) >> funnel_amount(n, wrap));
}

template <unsigned table>
std::uint32_t lop3(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    std::uint32_t result = 0;
    for (unsigned row = 0; row < 8; ++row)
        if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return result;
}

inline std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t pick = selector >> 4 * i & 15;
        std::uint32_t byte = static_cast<std::uint32_t>(bytes >> 8 * (pick & 7)) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign alone
        result |= byte << 8 * i;
    }
    return result;
}

template <class T>
T extract_bits(T a, std::uint32_t position, std::uint32_t length) {
    constexpr std::uint32_t width = 8 * sizeof(T);
    using U = std::make_unsigned_t<T>;
    position &= 0xff;
    length &= 0xff;
    if (length == 0) return 0;
    const U shifted = static_cast<U>(shift_right<T>(a, position));  // its sign fills what lies beyond the top
    if (length >= width) return static_cast<T>(shifted);
    const U field = shifted & ((U{1} << length) - 1);
    const bool sign = std::is_signed_v<T> && static_cast<U>(a) >> std::min(position + length - 1, width - 1) & 1;
    return static_cast<T>(sign ? field | ~((U{1} << length) - 1) : field);
}

template <class T>
T insert_bits(T a, T b, std::uint32_t position, std::uint32_t length) {
    position &= 0xff;
    length &= 0xff;
    const T ones = length >= 8 * sizeof(T) ? static_cast<T>(-1) : static_cast<T>((T{1} << length) - 1);
    const T mask = shift_left<T>(ones, position);
    return static_cast<T>((b & ~mask) | (shift_left<T>(a, position) & mask));
}

template <class T>
std::uint32_t leading_zeros(T a) {
    if (a == 0) return 8 * sizeof(T);
    return static_cast<std::uint32_t>(__builtin_clzll(a)) - (64 - 8 * sizeof(T));
}
template <class T>
std::uint32_t count_ones(T a) {
    return static_cast<std::uint32_t>(__builtin_popcountll(a));
}
template <class T>
T reverse_bits(T a) {
    T result = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); ++i) result = static_cast<T>(result << 1 | (a >> i & 1));
    return result;
}
template <class T>
std::uint32_t find_bit(T a, bool from_top) {
    using U = std::make_unsigned_t<T>;
    const std::uint32_t zeros = leading_zeros<U>(static_cast<U>(a < 0 ? ~a : a));
    if (zeros == 8 * sizeof(T)) return ~0u;
    return from_top ? zeros : static_cast<std::uint32_t>(8 * sizeof(T)) - 1 - zeros;
}

template <class A, class B>
std::uint32_t dot4(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    for (int i = 0; i < 4; ++i)
        c += static_cast<std::uint32_t>(static_cast<A>(a >> 8 * i) * static_cast<B>(b >> 8 * i));
    return c;
}

// The nearest value that To has.
template <class To, class From>
To clamp(From value) {
    const __int128 wide = value;
    return static_cast<To>(std::clamp<__int128>(wide, std::numeric_limits<To>::min(), std::numeric_limits<To>::max()));
}

// --- floats ---

template <class To, class From>
To to_integer(From value) {
    if (value != value) return 0;
    if (value <= static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    if (value >= std::ldexp(From{1}, std::numeric_limits<To>::digits)) return std::numeric_limits<To>::max();
    return static_cast<To>(value);
}

inline float saturate(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
inline float rectify(float x) { return x != x ? canonical_nan : x > 0 ? x : 0.0f; }
inline float flush(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

template <class T> bool compare_eq(T a, T b) { return a == b; }
template <class T> bool compare_ne(T a, T b) { return a < b || a > b; }
template <class T> bool compare_lt(T a, T b) { return a < b; }
template <class T> bool compare_le(T a, T b) { return a <= b; }
template <class T> bool compare_gt(T a, T b) { return a > b; }
template <class T> bool compare_ge(T a, T b) { return a >= b; }
template <class T> bool compare_equ(T a, T b) { return !(a < b || a > b); }
template <class T> bool compare_neu(T a, T b) { return a != b; }
template <class T> bool compare_ltu(T a, T b) { return !(a >= b); }
template <class T> bool compare_leu(T a, T b) { return !(a > b); }
template <class T> bool compare_gtu(T a, T b) { return !(a <= b); }
template <class T> bool compare_geu(T a, T b) { return !(a < b); }
template <class T> bool compare_num(T a, T b) { return a == a && b == b; }
template <class T> bool compare_nan(T a, T b) { return a != a || b != b; }

// --- memory ---

template <class T, int count>
T* global(std::uint64_t address) {
    constexpr std::uint64_t lowest = 4096;  // below it is nobody's memory: a null pointer with an offset
    if (address % (sizeof(T) * count) != 0)
        fail("global address " + std::to_string(address) + " is not a multiple of " + std::to_string(sizeof(T) * count));
    if (address < lowest) fail("global address " + std::to_string(address) + " is outside of any memory");
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

template <class T, int count>
T* shared(std::uint32_t address) {
    constexpr std::size_t bytes = sizeof(T) * count;
    if (address % bytes != 0 || address + bytes > shared_bytes())
        check_shared(shared_at(address), bytes, bytes, "shared memory");
    return reinterpret_cast<T*>(shared_at(address));
}

inline bool is_shared(std::uint64_t address) {
    const auto start = reinterpret_cast<std::uintptr_t>(shared_memory());
    return address >= start && address < start + shared_bytes();
}
inline std::uint64_t shared_to_generic(std::uint64_t address) {
    return reinterpret_cast<std::uintptr_t>(shared_memory()) + address;
}
inline std::uint64_t generic_to_shared(std::uint64_t address) {
    return address - reinterpret_cast<std::uintptr_t>(shared_memory());
}

template <class T, int count>
T* generic(std::uint64_t address) {
    if (is_shared(address)) return shared<T, count>(static_cast<std::uint32_t>(generic_to_shared(address)));
    return global<T, count>(address);
}

// Part of an array whose bounds are known: a thread's own memory, a kernel's parameters.
template <class T, int count>
T* within(const void* array, std::size_t array_bytes, std::uint64_t address, const char* name) {
    constexpr std::size_t bytes = sizeof(T) * count;
    const std::uint64_t offset = address - reinterpret_cast<std::uintptr_t>(array);
    if (offset > array_bytes || bytes > array_bytes - offset)
        fail(std::string(name) + ": offset " + std::to_string(static_cast<std::int64_t>(offset)) + ", outside of its " +
             std::to_string(array_bytes) + " bytes");
    return global<T, count>(address);
}

template <class T, int count>
T* local(void* array, std::size_t array_bytes, std::uint64_t address) {
    return within<T, count>(array, array_bytes, address, "local memory");
}
template <class T, int count>
const T* parameter(const void* parameters, std::size_t parameter_bytes, std::uint64_t address) {
    return within<T, count>(parameters, parameter_bytes, address, "parameters");
}

inline void copy_async(std::uint32_t to, std::uint64_t from, int bytes, int given) {
    emulator::copy_async(shared_at(to), reinterpret_cast<const void*>(static_cast<std::uintptr_t>(from)), bytes, given);
}

// --- block and warp ---

inline void require_full_mask(std::uint32_t members, const char* instruction) {
    if (members != ~0u) fail(std::string(instruction) + " of part of a warp");
}

inline void barrier(int site) { emulator::barrier(site); }
inline void warp_barrier(std::uint32_t members) {
    require_full_mask(members, "bar.warp.sync");
    emulator::warp_barrier();
}

inline std::uint32_t shuffle(Shuffle mode, std::uint32_t word, std::uint32_t argument, std::uint32_t clamp_and_segment,
                             std::uint32_t members, bool& valid) {
    require_full_mask(members, "shfl.sync");
    return emulator::shuffle(word, mode, argument, clamp_and_segment, valid);
}

inline std::uint32_t ballot(bool predicate, std::uint32_t members) {
    require_full_mask(members, "vote.sync");
    return emulator::ballot(predicate);
}
inline bool vote_any(std::uint32_t votes) { return votes != 0; }
inline bool vote_all(std::uint32_t votes) {
    const int present = current->warp->lanes_at_start;
    return votes == (present == lanes ? ~0u : (1u << present) - 1);
}
inline bool vote_uni(std::uint32_t votes) { return !vote_any(votes) || vote_all(votes); }

inline void ldmatrix(std::uint32_t* r, int count, std::uint32_t row, bool transposed) {
    emulator::ldmatrix(r, count, shared_at(row), transposed);
}

}  // namespace pyadapt::emulator::ptx

namespace ptx = pyadapt::emulator::ptx;
