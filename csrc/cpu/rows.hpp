// Runs of a row: contiguous elements of any dtype to fp32 and back, with the dropout mask on the way.
#pragma once

#include "../core/dtype.hpp"
#include "../core/philox.hpp"
#include "simd.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {

// --- conversion ---

template <DType dtype>
PYADAPT_INLINE Floats load_floats(const void* data, std::int64_t at) {
    if constexpr (dtype == DType::f32) return load<Floats>(static_cast<const float*>(data) + at);
    if constexpr (dtype == DType::bf16) return from_bf16(load<Halves>(static_cast<const std::uint16_t*>(data) + at));
    if constexpr (dtype == DType::f16) return from_f16(load<Halves>(static_cast<const std::uint16_t*>(data) + at));
    if constexpr (dtype == DType::i8) return from_i8(static_cast<const std::int8_t*>(data) + at);
}

template <DType dtype>
PYADAPT_INLINE void store_floats(void* data, std::int64_t at, Floats v) {
    if constexpr (dtype == DType::f32) store(static_cast<float*>(data) + at, v);
    if constexpr (dtype == DType::bf16) store(static_cast<std::uint16_t*>(data) + at, to_bf16(v));
    if constexpr (dtype == DType::f16) store(static_cast<std::uint16_t*>(data) + at, to_f16(v));
}

// The last count < width elements; lanes beyond them are 0. The copy keeps reads inside the caller's memory.
template <DType dtype>
PYADAPT_INLINE Floats load_tail(const void* data, std::int64_t at, std::int64_t count) {
    alignas(64) unsigned char bytes[width * 4] = {};
    __builtin_memcpy(bytes, static_cast<const unsigned char*>(data) + at * size_of(dtype), count * size_of(dtype));
    return load_floats<dtype>(bytes, 0);
}

template <DType dtype>
PYADAPT_INLINE void store_tail(void* data, std::int64_t at, std::int64_t count, Floats v) {
    alignas(64) unsigned char bytes[width * 4];
    store_floats<dtype>(bytes, 0, v);
    __builtin_memcpy(static_cast<unsigned char*>(data) + at * size_of(dtype), bytes, count * size_of(dtype));
}

template <DType dtype>
static void widen_as(const void* data, std::int64_t at, std::int64_t count, float* to) {
    std::int64_t i = 0;
    for (; i + width <= count; i += width) store(to + i, load_floats<dtype>(data, at + i));
    if (i < count) {
        const Floats tail = load_tail<dtype>(data, at + i, count - i);
        __builtin_memcpy(to + i, &tail, (count - i) * sizeof(float));
    }
}

template <DType dtype>
static void narrow_as(const float* from, void* data, std::int64_t at, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + width <= count; i += width) store_floats<dtype>(data, at + i, load<Floats>(from + i));
    if (i < count) store_tail<dtype>(data, at + i, count - i, load_tail<DType::f32>(from, i, count - i));
}

// to[0, count) = the elements data[at, at + count) in fp32.
static inline void widen(const void* data, DType dtype, std::int64_t at, std::int64_t count, float* to) {
    switch (dtype) {
        case DType::f32: return widen_as<DType::f32>(data, at, count, to);
        case DType::bf16: return widen_as<DType::bf16>(data, at, count, to);
        case DType::f16: return widen_as<DType::f16>(data, at, count, to);
        case DType::i8: return widen_as<DType::i8>(data, at, count, to);
        case DType::i64: return;
    }
}

// The elements data[at, at + count) = from[0, count), rounded to nearest even.
static inline void narrow(const float* from, void* data, DType dtype, std::int64_t at, std::int64_t count) {
    switch (dtype) {
        case DType::f32: return narrow_as<DType::f32>(from, data, at, count);
        case DType::bf16: return narrow_as<DType::bf16>(from, data, at, count);
        case DType::f16: return narrow_as<DType::f16>(from, data, at, count);
        case DType::i8:
        case DType::i64: return;
    }
}

// --- dropout ---

// Chains of rounds that run side by side: one alone would wait for its multiplications.
constexpr int philox_chains = PYADAPT_WIDTH == 16 ? 4 : 2;
constexpr std::int64_t draws_at_once = philox_chains * 2 * width;

// The draws of draws_at_once elements of row m, from column k on, k a multiple of 4: draws[i] belongs to column k + i.
PYADAPT_INLINE void philox_draws(const Dropout& dropout, std::int64_t m, std::int64_t k, std::uint32_t* draws) {
    // One counter a 64-bit lane: the upper halves hold rubbish that neither multiply_low nor the result looks at.
    Longs c0[philox_chains], c1[philox_chains], c2[philox_chains], c3[philox_chains];
    Longs group = Longs{} + static_cast<std::uint64_t>(k / 4);
    for (int lane = 0; lane < width / 2; ++lane) group[lane] += lane;
#pragma GCC unroll 4
    for (int i = 0; i < philox_chains; ++i) {
        c0[i] = (group + static_cast<std::uint64_t>(i * width / 2)) & 0xffffffffu;
        c1[i] = Longs{} + (static_cast<std::uint64_t>(m) & 0xffffffffu);
        c2[i] = Longs{} + (static_cast<std::uint64_t>(m) >> 32);
        c3[i] = Longs{};
    }
    std::uint32_t key0 = dropout.key[0], key1 = dropout.key[1];
    for (int round = 0; round < philox::rounds; ++round) {
#pragma GCC unroll 4
        for (int i = 0; i < philox_chains; ++i) {
            const Longs product0 = multiply_low(c0[i], philox::multiplier[0]);
            const Longs product1 = multiply_low(c2[i], philox::multiplier[1]);
            c0[i] = (product1 >> 32) ^ c1[i] ^ static_cast<std::uint64_t>(key0);
            c1[i] = product1;
            c2[i] = (product0 >> 32) ^ c3[i] ^ static_cast<std::uint64_t>(key1);
            c3[i] = product0;
        }
        key0 += philox::weyl[0];
        key1 += philox::weyl[1];
    }
#pragma GCC unroll 4
    for (int i = 0; i < philox_chains; ++i) {
        const Longs lanes01 = (c0[i] & 0xffffffffu) | (c1[i] << 32);
        const Longs lanes23 = (c2[i] & 0xffffffffu) | (c3[i] << 32);
        store(draws + 2 * i * width, zip_low(lanes01, lanes23));
        store(draws + (2 * i + 1) * width, zip_high(lanes01, lanes23));
    }
}

// drop() in place on the fp32 values of row m, columns [k, k + count), k a multiple of 4.
static inline void drop(const Dropout& dropout, std::int64_t m, std::int64_t k, std::int64_t count, float* values) {
    if (dropout.threshold == 0) return;
    if (dropout.threshold >> 32) {
        for (std::int64_t i = 0; i < count; ++i) values[i] = 0.0f;
        return;
    }
    const Words threshold = Words{} + static_cast<std::uint32_t>(dropout.threshold);
    const Floats scale = broadcast(dropout.scale);
    std::uint32_t draws[draws_at_once];
    for (std::int64_t i = 0; i < count; i += draws_at_once) {
        philox_draws(dropout, m, k + i, draws);
        for (std::int64_t part = 0; part < draws_at_once && i + part < count; part += width) {
            const Words draw = load<Words>(draws + part);
            float* at = values + i + part;
            const std::int64_t rest = count - i - part;
            // A dropped NaN or Inf is dropped: a choice, not a product.
            if (rest >= width) {
                store(at, draw >= threshold ? load<Floats>(at) * scale : Floats{});
            } else {
                const Floats value = load_tail<DType::f32>(at, 0, rest);
                store_tail<DType::f32>(at, 0, rest, draw >= threshold ? value * scale : Floats{});
            }
        }
    }
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
