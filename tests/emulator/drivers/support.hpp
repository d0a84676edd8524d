// What every driver needs: operands on the heap that nobody can read past, plain references, cases and their verdicts.
//
// A driver is one list:
//
//   int main(int argc, char** argv) {
//       return driver::run(argc, argv, {
//           {"16x64x128", [](driver::Check& check) { ... launch ...; check(got, want, tolerance); }},
//           {"1000x1000", [](driver::Check& check) { ... }, driver::Size::large},   // not under the sanitizers
//       });
//   }
//
// Each case runs in every fiber order and prints a line; the exit status is 0 when all are right. An argument picks the
// cases whose names contain it. ldmatrix must have no bank conflict unless the case allows some.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "core/dtype.hpp"
#include "cuda/kernels.hpp"
#include "fibers.hpp"

#ifndef PYADAPT_ARCH
#define PYADAPT_ARCH 800
#endif

namespace driver {

using pyadapt::DType;
namespace emulator = pyadapt::emulator;

constexpr bool has_bf16 = PYADAPT_ARCH >= 800;

inline pyadapt::cuda::Launch launch_settings(int multiprocessors = 4) {
    return {nullptr, PYADAPT_ARCH / 10, multiprocessors};
}

// The 16-bit floating dtypes that this architecture multiplies.
inline std::vector<DType> half_dtypes() {
    return has_bf16 ? std::vector{DType::f16, DType::bf16} : std::vector{DType::f16};
}

// Relative rounding error of a dtype.
inline double epsilon_of(DType dtype) {
    return dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : dtype == DType::bf16 ? 0x1p-8 : 0;
}

// Memory of exactly this size between guard zones. Guards and the memory itself start as 0xFF, which is NaN in every
// floating dtype: a stray read shows in the result, a stray write when the buffer goes. AddressSanitizer sees both.
class Memory {
public:
    static constexpr std::size_t alignment = 256;  // what cudaMalloc gives
    static constexpr unsigned char pattern = 0xFF;

    // `shift` bytes behind an aligned address.
    explicit Memory(std::size_t bytes, std::size_t shift = 0) : before_(alignment + shift), bytes_(bytes) {
        const std::size_t total = (before_ + bytes + alignment + alignment - 1) / alignment * alignment;
        behind_ = total - before_ - bytes;
        base_ = static_cast<unsigned char*>(std::aligned_alloc(alignment, total));
        if (!base_) std::abort();
        std::memset(base_, pattern, total);
        emulator::forbid(base_, before_);
        emulator::forbid(data() + bytes_, behind_);
    }
    ~Memory() {
        emulator::allow(base_, before_ + bytes_ + behind_);
        for (std::size_t i = 0; i < before_; ++i) check_guard(base_[i]);
        for (std::size_t i = 0; i < behind_; ++i) check_guard(data()[bytes_ + i]);
        std::free(base_);
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    Memory(Memory&& other) noexcept
        : before_(other.before_), behind_(other.behind_), bytes_(other.bytes_), base_(other.base_) {
        other.base_ = nullptr;
        other.before_ = other.behind_ = other.bytes_ = 0;
    }

    unsigned char* data() const { return base_ + before_; }
    std::size_t bytes() const { return bytes_; }

private:
    static void check_guard(unsigned char byte) {
        if (byte != pattern) emulator::fail("a write outside an operand");
    }

    std::size_t before_, behind_ = 0, bytes_;
    unsigned char* base_;
};

using Random = std::mt19937_64;

inline double uniform(Random& random, double low, double high) {
    return low + (high - low) * static_cast<double>(random() >> 11) * 0x1p-53;
}

// `count` elements of a dtype, `shift` of them behind an aligned address.
class Array {
public:
    Array(DType dtype, std::int64_t count, int shift = 0)
        : dtype_(dtype),
          count_(count),
          memory_(static_cast<std::size_t>(count) * pyadapt::size_of(dtype),
                  static_cast<std::size_t>(shift) * pyadapt::size_of(dtype)) {}

    // Uniform values; integers over all of int8 but -128.
    static Array random(DType dtype, std::int64_t count, Random& random, int shift = 0, double low = -1,
                        double high = 1) {
        Array array(dtype, count, shift);
        for (std::int64_t i = 0; i < count; ++i)
            array.set(i, dtype == DType::i8 ? static_cast<double>(random() % 255) - 127 : uniform(random, low, high));
        return array;
    }

    DType dtype() const { return dtype_; }
    std::int64_t count() const { return count_; }
    void* data() const { return memory_.data(); }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(memory_.data());
    }

    double get(std::int64_t i) const {
        const unsigned char* at = memory_.data() + i * pyadapt::size_of(dtype_);
        switch (dtype_) {
            case DType::f32: return load<float>(at);
            case DType::f16: return __half2float(load<__half>(at));
            case DType::bf16: return __bfloat162float(load<__nv_bfloat16>(at));
            case DType::i8: return load<std::int8_t>(at);
            case DType::i64: return static_cast<double>(load<std::int64_t>(at));
        }
        return NAN;
    }

    // Rounded to the dtype.
    void set(std::int64_t i, double value) {
        unsigned char* at = memory_.data() + i * pyadapt::size_of(dtype_);
        switch (dtype_) {
            case DType::f32: store(at, static_cast<float>(value)); break;
            case DType::f16: store(at, __float2half_rn(static_cast<float>(value))); break;
            case DType::bf16: store(at, __float2bfloat16_rn(static_cast<float>(value))); break;
            case DType::i8: store(at, static_cast<std::int8_t>(value)); break;
            case DType::i64: store(at, static_cast<std::int64_t>(value)); break;
        }
    }

private:
    template <class T>
    static T load(const unsigned char* at) {
        T value;
        std::memcpy(&value, at, sizeof(T));
        return value;
    }
    template <class T>
    static void store(unsigned char* at, T value) {
        std::memcpy(at, &value, sizeof(T));
    }

    DType dtype_;
    std::int64_t count_;
    Memory memory_;
};

// The four draws of elements (row, 4 group .. 4 group + 3): Philox4x32-10, written from the paper.
inline std::vector<std::uint32_t> philox(std::uint64_t seed, std::uint64_t row, std::uint32_t group) {
    std::uint32_t counter[4] = {group, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32), 0};
    std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t first = std::uint64_t{0xD2511F53u} * counter[0];
        const std::uint64_t second = std::uint64_t{0xCD9E8D57u} * counter[2];
        const std::uint32_t next[4] = {
            static_cast<std::uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(second),
            static_cast<std::uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(first)};
        std::memcpy(counter, next, sizeof counter);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return {counter, counter + 4};
}

// A dropout with this probability, the seed in the struct or, where `seed_memory` is given, on the device.
inline pyadapt::cuda::DeviceDropout dropout_of(double probability, std::uint64_t seed, Array* seed_memory = nullptr) {
    if (seed_memory) std::memcpy(seed_memory->data(), &seed, sizeof seed);
    const std::uint64_t key = seed_memory ? 0 : seed;
    return {seed_memory ? seed_memory->as<const std::int64_t>() : nullptr,
            {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)},
            static_cast<std::uint64_t>(std::llround(probability * 0x1p32)),
            probability < 1 ? static_cast<float>(1 / (1 - probability)) : 0.0f};
}

inline bool keeps(const pyadapt::cuda::DeviceDropout& dropout, std::int64_t row, std::int64_t column) {
    if (dropout.threshold == 0) return true;
    const std::uint64_t seed = dropout.seed ? static_cast<std::uint64_t>(*dropout.seed)
                                            : dropout.key[0] | static_cast<std::uint64_t>(dropout.key[1]) << 32;
    return philox(seed, row, static_cast<std::uint32_t>(column / 4))[column % 4] >= dropout.threshold;
}

// The verdict on a case, comparison by comparison.
class Check {
public:
    // |got - want| <= tolerance. NaN equals NaN and an infinity itself, and nothing else.
    void operator()(double got, double want, double tolerance, const char* what = "value", std::int64_t index = -1) {
        ++compared_;
        const bool same = (std::isnan(got) && std::isnan(want)) || got == want;
        const double difference = std::fabs(got - want);
        if (same || difference <= tolerance) {
            if (!same && tolerance > 0 && difference / tolerance > worst_) worst_ = difference / tolerance;
            return;
        }
        if (wrong_++ == 0) {
            char text[200];
            std::snprintf(text, sizeof text, "%s[%lld] is %.9g, should be %.9g within %.3g", what,
                          static_cast<long long>(index), got, want, tolerance);
            first_ = text;
        }
    }

    void succeeded(cudaError_t error) {
        ++compared_;
        if (error != cudaSuccess && wrong_++ == 0) first_ = "the launcher gave error " + std::to_string(error);
    }

    void require(bool condition, const char* what) {
        ++compared_;
        if (!condition && wrong_++ == 0) first_ = what;
    }

    // Bank conflicts of ldmatrix that this case may have.
    void allow_conflicts(long conflicts) { conflicts_allowed_ = conflicts; }

    bool passed() const { return wrong_ == 0 && compared_ > 0; }
    long compared() const { return compared_; }
    long wrong() const { return wrong_; }
    double worst() const { return worst_; }
    long conflicts_allowed() const { return conflicts_allowed_; }
    const std::string& first() const { return first_; }

private:
    long compared_ = 0, wrong_ = 0, conflicts_allowed_ = 0;
    double worst_ = 0;
    std::string first_ = "nothing was compared";
};

enum class Size { small, large };  // large: left out where PYADAPT_EMULATOR_CASES=small, as under the sanitizers

struct Case {
    std::string name;
    std::function<void(Check&)> body;
    Size size = Size::small;
};

inline const char* name_of(emulator::Order order) {
    return order == emulator::Order::forward ? "forward" : order == emulator::Order::reverse ? "reverse" : "random";
}

inline bool run_case(const Case& one, emulator::Order order) {
    emulator::set_order(order);
    emulator::counters = {};
    Check check;
    const auto start = std::chrono::steady_clock::now();
    one.body(check);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const emulator::Counters& counted = emulator::counters;
    const bool conflicts = counted.ldmatrix_conflicts > check.conflicts_allowed();
    const bool passed = check.passed() && !conflicts;
    std::printf("%s %s %s: error/tolerance %.3f of %ld, mma %ld, ldmatrix %ld, ldmatrix conflicts %ld, %.3f s\n",
                passed ? "ok" : "FAIL", one.name.c_str(), name_of(order), check.worst(), check.compared(), counted.mma,
                counted.ldmatrix, counted.ldmatrix_conflicts, seconds);
    if (!check.passed())
        std::printf("    %s; %ld of %ld wrong\n", check.first().c_str(), check.wrong(), check.compared());
    if (conflicts)
        std::printf("    bank conflicts: %ld, allowed %ld\n", counted.ldmatrix_conflicts, check.conflicts_allowed());
    std::fflush(stdout);
    return passed;
}

// PYADAPT_EMULATOR_ORDER runs one order instead of all; a failed case ends the run where PYADAPT_EMULATOR_FIRST is set.
inline int run(int argc, char** argv, const std::vector<Case>& cases) {
    using emulator::Order;
    std::vector<Order> orders = {Order::forward, Order::reverse, Order::random};
    if (std::getenv("PYADAPT_EMULATOR_ORDER")) {
        emulator::set_order_from_environment();
        orders = {emulator::schedule.order};
    }
    const char* sizes = std::getenv("PYADAPT_EMULATOR_CASES");
    const bool small = sizes && !std::strcmp(sizes, "small"), stop = std::getenv("PYADAPT_EMULATOR_FIRST");
    int failed = 0, done = 0;
    for (const Case& one : cases) {
        if (small && one.size == Size::large) continue;
        if (argc > 1 && one.name.find(argv[1]) == std::string::npos) continue;
        for (Order order : orders) {
            ++done;
            if (run_case(one, order)) continue;
            ++failed;
            if (stop) return 1;
        }
    }
    std::printf("%d of %d failed\n", failed, done);
    return failed > 0 || done == 0;
}

}  // namespace driver
