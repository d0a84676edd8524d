// 16-bit floats as translated PTX needs them: arithmetic on one or on a pair in a word, rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "mma.hpp"

namespace pyadapt::emulator::ptx {

template <class To, class From>
constexpr To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    return __builtin_bit_cast(To, from);
}

// x as a float that, rounded again to 22 bits or fewer, gives what rounding x once would: inexact values get an odd last
// bit, so that they never look like a tie.
inline float round_to_odd(double x) {
    const float nearest = static_cast<float>(x);
    if (static_cast<double>(nearest) == x || x != x) return nearest;
    const auto magnitude = std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? bits<std::uint32_t>(nearest) - 1
                                                                                : bits<std::uint32_t>(nearest);
    return bits<float>(magnitude | 1);
}

// a + b in the same way, as a double.
inline double sum_to_odd(double a, double b) {
    const double sum = a + b, part = sum - a;
    const double error = (a - (sum - part)) + (b - part);
    if (!std::isfinite(sum) || error == 0 || (bits<std::uint64_t>(sum) & 1)) return sum;
    return std::nextafter(sum, error > 0 ? std::numeric_limits<double>::infinity()
                                         : -std::numeric_limits<double>::infinity());
}

// Products of two 16-bit floats are exact in double.
struct Add {
    float operator()(float a, float b) const { return round_to_odd(sum_to_odd(a, b)); }
};
struct Subtract {
    float operator()(float a, float b) const { return round_to_odd(sum_to_odd(a, -static_cast<double>(b))); }
};
struct Multiply {
    float operator()(float a, float b) const { return round_to_odd(static_cast<double>(a) * b); }
};
struct FusedMultiplyAdd {
    float operator()(float a, float b, float c) const {
        return round_to_odd(sum_to_odd(static_cast<double>(a) * b, c));
    }
};

constexpr float canonical_nan = bits<float>(0x7fffffffu);

// The number where the other is NaN, or NaN then; -0 below +0.
struct Minimum {
    bool keeps_nan;
    float operator()(float a, float b) const {
        if (a != a || b != b) return keeps_nan || (a != a && b != b) ? canonical_nan : a != a ? b : a;
        return a < b || (a == b && std::signbit(a)) ? a : b;
    }
};
struct Maximum {
    bool keeps_nan;
    float operator()(float a, float b) const {
        if (a != a || b != b) return keeps_nan || (a != a && b != b) ? canonical_nan : a != a ? b : a;
        return a > b || (a == b && !std::signbit(a)) ? a : b;
    }
};

// An operation on floats, done on one 16-bit float or on both halves of a word.
template <class Format>
struct Halves {
    template <class Function, class... Rest>
    static std::uint16_t apply(Function function, std::uint16_t a, Rest... rest) {
        return Format::nearest(function(Format::value(a), Format::value(rest)...));
    }
    template <class Function, class... Rest>
    static std::uint32_t apply(Function function, std::uint32_t a, Rest... rest) {
        const auto low = apply(function, static_cast<std::uint16_t>(a), static_cast<std::uint16_t>(rest)...);
        const auto high = apply(function, static_cast<std::uint16_t>(a >> 16), static_cast<std::uint16_t>(rest >> 16)...);
        return low | static_cast<std::uint32_t>(high) << 16;
    }
};

struct Half : Halves<Half> {
    static float value(std::uint16_t half) { return F16::widen(half); }

    static std::uint16_t nearest(float x) {
        const auto magnitude = bits<std::uint32_t>(x) & 0x7fffffffu;
        const auto sign = static_cast<std::uint16_t>(bits<std::uint32_t>(x) >> 16 & 0x8000);
        if (x != x) return 0x7fff;
        if (magnitude >= bits<std::uint32_t>(65520.0f)) return sign | 0x7c00;
        if (magnitude < bits<std::uint32_t>(0x1p-14f)) {
            // In [0.5, 1) the last bit of a float is a subnormal half's: the sum rounds as it should.
            return sign | static_cast<std::uint16_t>(bits<std::uint32_t>(bits<float>(magnitude) + 0.5f) -
                                                     bits<std::uint32_t>(0.5f));
        }
        const auto rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
        return sign | static_cast<std::uint16_t>((rounded >> 13) - (112u << 10));
    }

    static std::uint16_t toward_zero(float x) {
        const auto magnitude = bits<std::uint32_t>(x) & 0x7fffffffu;
        const auto sign = static_cast<std::uint16_t>(bits<std::uint32_t>(x) >> 16 & 0x8000);
        if (x != x) return 0x7fff;
        if (std::isinf(x)) return sign | 0x7c00;
        if (magnitude >= bits<std::uint32_t>(65536.0f)) return sign | 0x7bff;
        if (magnitude < bits<std::uint32_t>(0x1p-14f))
            return sign | static_cast<std::uint16_t>(bits<float>(magnitude) * 0x1p24f);
        return sign | static_cast<std::uint16_t>((magnitude >> 13) - (112u << 10));
    }
};

struct BFloat : Halves<BFloat> {
    static float value(std::uint16_t half) { return BF16::widen(half); }

    static std::uint16_t nearest(float x) {
        const auto word = bits<std::uint32_t>(x);
        if (x != x) return 0x7fff;
        return static_cast<std::uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
    }

    static std::uint16_t toward_zero(float x) {
        return x != x ? 0x7fff : static_cast<std::uint16_t>(bits<std::uint32_t>(x) >> 16);
    }
};

// To the 10 bits of mantissa of tf32: nearest, ties away from zero.
inline std::uint32_t round_tf32(float x) {
    if (x != x) return 0x7fffffffu;
    return (bits<std::uint32_t>(x) + 0x1000u) & 0xffffe000u;
}

}  // namespace pyadapt::emulator::ptx
