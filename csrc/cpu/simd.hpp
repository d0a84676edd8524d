// Vectors of one instruction set: PYADAPT_WIDTH lanes of 32 bits, in GCC's and Clang's vector extensions, so that one
// kernel source serves every width. Intrinsics stand only where the extensions reach no single instruction.
//
// Compiled once for each instruction set, in a namespace of its own: PYADAPT_ISA. Everything here is inlined by force,
// for a shared out-of-line copy could be the one that this machine cannot run.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PYADAPT_INLINE static inline __attribute__((always_inline))

namespace pyadapt::cpu::PYADAPT_ISA {

constexpr int width = PYADAPT_WIDTH;

typedef float Floats __attribute__((vector_size(width * 4)));
typedef std::int32_t Ints __attribute__((vector_size(width * 4)));
typedef std::uint32_t Words __attribute__((vector_size(width * 4)));
typedef std::uint64_t Longs __attribute__((vector_size(width * 4)));  // width / 2 lanes
typedef std::uint16_t Halves __attribute__((vector_size(width * 2)));
typedef std::int8_t Bytes __attribute__((vector_size(width)));

template <class Vector, class Element>
PYADAPT_INLINE Vector load(const Element* from) {
    Vector v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

template <class Vector, class Element>
PYADAPT_INLINE void store(Element* to, Vector v) {
    __builtin_memcpy(to, &v, sizeof v);
}

// x - 0 is x for every x, -0 and NaN included (x + 0 is not), and so this costs one broadcast and no arithmetic.
PYADAPT_INLINE Floats broadcast(float x) { return x - Floats{}; }

PYADAPT_INLINE float sum(Floats v) {
    float lanes[width];
    store(lanes, v);
    for (int half = width / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// --- 16-bit and 8-bit elements to fp32 and back ---

PYADAPT_INLINE Floats from_bf16(Halves h) { return (Floats)(__builtin_convertvector(h, Words) << 16); }

// Round to nearest even. A NaN stays one: its payload could round to infinity, so it gets the quiet bit instead.
PYADAPT_INLINE Halves to_bf16(Floats v) {
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector((Words)(v != v ? quiet : rounded), Halves);
}

#if defined(__F16C__) && PYADAPT_WIDTH == 8

PYADAPT_INLINE Floats from_f16(Halves h) { return (Floats)_mm256_cvtph_ps((__m128i)h); }
PYADAPT_INLINE Halves to_f16(Floats v) { return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }

#elif defined(__AVX512F__) && PYADAPT_WIDTH == 16

PYADAPT_INLINE Floats from_f16(Halves h) { return (Floats)_mm512_cvtph_ps((__m256i)h); }
PYADAPT_INLINE Halves to_f16(Floats v) { return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }

#else

// Half to float by arithmetic: the bits moved up by 13 are the value times 2^-112, subnormals included.
PYADAPT_INLINE Floats from_f16(Halves h) {
    const Words bits = __builtin_convertvector(h, Words);
    const Words magnitude = (bits & 0x7fffu) << 13;
    const Words finite = (Words)((Floats)magnitude * 0x1p112f);
    const Words special = magnitude | 0x7f800000u;  // infinities and NaNs
    const Words value = (bits & 0x7fffu) >= 0x7c00u ? special : finite;
    return (Floats)(value | ((bits & 0x8000u) << 16));
}

// Float to half, round to nearest even. Below 2^-14 adding 0.5 lets the adder round at the place of a subnormal's last
// bit, which is 2^-24; from 65520 on the result is infinite.
PYADAPT_INLINE Halves to_f16(Floats v) {
    const Words bits = (Words)v;
    const Words magnitude = bits & 0x7fffffffu;
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
    const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    Words half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves);
}

#endif

#if defined(__AVX2__) && PYADAPT_WIDTH == 8
PYADAPT_INLINE Floats from_i8(const std::int8_t* q) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
}
#elif defined(__AVX512F__) && PYADAPT_WIDTH == 16
PYADAPT_INLINE Floats from_i8(const std::int8_t* q) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
}
#else
PYADAPT_INLINE Floats from_i8(const std::int8_t* q) {
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(q), Ints), Floats);
}
#endif

// --- 64-bit lanes, for Philox ---

// The low 32 bits of each lane times a constant.
PYADAPT_INLINE Longs multiply_low(Longs a, std::uint32_t b) {
#if defined(__AVX2__) && PYADAPT_WIDTH == 8
    return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__AVX512F__) && PYADAPT_WIDTH == 16
    return (Longs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#else
    return (a & 0xffffffffu) * static_cast<std::uint64_t>(b);
#endif
}

// a0 b0 a1 b1 ... : the lower and the upper half of the interleaved lanes.
#if PYADAPT_WIDTH == 4
#define PYADAPT_ZIP_LOW 0, 2
#define PYADAPT_ZIP_HIGH 1, 3
#elif PYADAPT_WIDTH == 8
#define PYADAPT_ZIP_LOW 0, 4, 1, 5
#define PYADAPT_ZIP_HIGH 2, 6, 3, 7
#elif PYADAPT_WIDTH == 16
#define PYADAPT_ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define PYADAPT_ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#endif
PYADAPT_INLINE Longs zip_low(Longs a, Longs b) { return __builtin_shufflevector(a, b, PYADAPT_ZIP_LOW); }
PYADAPT_INLINE Longs zip_high(Longs a, Longs b) { return __builtin_shufflevector(a, b, PYADAPT_ZIP_HIGH); }

// --- pairs of bf16 in a 32-bit lane ---

#if PYADAPT_PAIRS
// acc + low half product + high half product: one instruction where there is one, its definition in fp32 elsewhere.
PYADAPT_INLINE Floats dot_pairs(Floats acc, Words a, Words b) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    const Floats a_low = (Floats)(a << 16), a_high = (Floats)(a & 0xffff0000u);
    const Floats b_low = (Floats)(b << 16), b_high = (Floats)(b & 0xffff0000u);
    return (acc + a_high * b_high) + a_low * b_low;
#endif
}
#endif

}  // namespace pyadapt::cpu::PYADAPT_ISA
