// Matrix instructions, from operands in registers as the PTX ISA lays them out to results laid out likewise.
//
//   mma_m16n8k16<Format>(d, a, b), mma_m16n8k8<Format>(d, a, b)   d (4 floats) += a b; Format: F16, BF16
//   mma_m16n8k8_tf32(d, a, b)                                     a, b: bits of fp32, of which the low 13 are ignored
//   mma_m16n8k8_f32(d, a, b)                                      the same operands in full: no such instruction exists
//   ldmatrix(r, count, row, transposed)                           count 1, 2 or 4 matrices; `row`, this lane's, lies in
//                                                                 shared memory; lanes from 8 count on have none
//
// Of 16 bits and of tf32 a product is exact in fp32 (11 by 11 bits at most). Sums are fp32, in order of depth, each
// rounded to nearest. Tensor cores sum several products at once with fewer bits: results agree to a few units of fp32,
// not in bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "fragments.hpp"
#include "shared.hpp"
#include "warp.hpp"

namespace pyadapt::emulator {

[[gnu::always_inline]] inline float float_of_bits(std::uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// How 16 bits become a float; without branches, so that a compiler vectorises it.
struct F16 {
    static constexpr const char* m16n8k16 = "mma.m16n8k16.f16";
    static constexpr const char* m16n8k8 = "mma.m16n8k8.f16";
    [[gnu::always_inline]] static float widen(std::uint16_t bits) {
        const std::uint32_t magnitude = static_cast<std::uint32_t>(bits & 0x7fff) << 13;
        const float finite = float_of_bits(magnitude) * 0x1p112f;  // exact, also of subnormals
        const float special = float_of_bits(magnitude | 0x7f800000u);
        const float value = (bits & 0x7c00) == 0x7c00 ? special : finite;
        return (bits & 0x8000) ? -value : value;
    }
};
struct BF16 {
    static constexpr const char* m16n8k16 = "mma.m16n8k16.bf16";
    static constexpr const char* m16n8k8 = "mma.m16n8k8.bf16";
    [[gnu::always_inline]] static float widen(std::uint16_t bits) {
        return float_of_bits(static_cast<std::uint32_t>(bits) << 16);
    }
};

namespace detail {

// Read and written in place: a memcpy could become a call, and a sanitizer looks into those.
typedef float Row8 __attribute__((vector_size(32), aligned(4), may_alias));

template <int registers_a, int registers_b>
struct Operands {
    float d[4];
    std::uint32_t a[registers_a], b[registers_b];
};

struct Sums {
    float d[4];
};

// d += a b for a (16 x depth), b (depth x 8), d (16 x 8).
template <int depth>
PYADAPT_ARITHMETIC void multiply(const float (&a)[16][depth], const float (&b)[depth][8], float (&d)[16][8]) {
    const auto* rows = reinterpret_cast<const Row8*>(b);
    auto* sums = reinterpret_cast<Row8*>(d);
    for (int i = 0; i < 16; ++i) {
        Row8 sum = sums[i];
        for (int k = 0; k < depth; ++k) sum += a[i][k] * rows[k];
        sums[i] = sum;
    }
}

template <class Given>
PYADAPT_ARITHMETIC void gather_accumulators(const Given* given, float (&d)[16][8]) {
    for (int lane = 0; lane < lanes; ++lane)
        for (int reg = 0; reg < 4; ++reg) {
            const Place at = accumulator_16x8(lane, reg);
            d[at.row][at.column] = given[lane].d[reg];
        }
}

PYADAPT_ARITHMETIC inline void scatter_accumulators(const float (&d)[16][8], Sums* taken) {
    for (int lane = 0; lane < lanes; ++lane)
        for (int reg = 0; reg < 4; ++reg) {
            const Place at = accumulator_16x8(lane, reg);
            taken[lane].d[reg] = d[at.row][at.column];
        }
}

template <class Format, int depth>
PYADAPT_ARITHMETIC void compute_16bit(const Operands<depth / 4, depth / 8>* given, Sums* taken) {
    alignas(32) std::uint16_t bits_a[16][depth], bits_b[depth][8];
    alignas(32) float a[16][depth], b[depth][8], d[16][8];
    for (int lane = 0; lane < lanes; ++lane)
        for (int half = 0; half < 2; ++half) {
            for (int reg = 0; reg < depth / 4; ++reg) {
                const Place at = depth == 16 ? a_16x16(lane, reg, half) : a_16x8(lane, reg, half);
                bits_a[at.row][at.column] = static_cast<std::uint16_t>(given[lane].a[reg] >> (16 * half));
            }
            for (int reg = 0; reg < depth / 8; ++reg) {
                const Place at = depth == 16 ? b_16x8(lane, reg, half) : b_8x8(lane, half);
                bits_b[at.row][at.column] = static_cast<std::uint16_t>(given[lane].b[reg] >> (16 * half));
            }
        }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < depth; ++k) a[i][k] = Format::widen(bits_a[i][k]);
    for (int k = 0; k < depth; ++k)
        for (int j = 0; j < 8; ++j) b[k][j] = Format::widen(bits_b[k][j]);
    gather_accumulators(given, d);
    multiply<depth>(a, b, d);
    scatter_accumulators(d, taken);
}

constexpr std::uint32_t tf32_bits = 0xffffe000u;

template <std::uint32_t mask>
PYADAPT_ARITHMETIC void compute_32bit(const Operands<4, 2>* given, Sums* taken) {
    alignas(32) float a[16][8], b[8][8], d[16][8];
    for (int lane = 0; lane < lanes; ++lane) {
        for (int reg = 0; reg < 4; ++reg) {
            const Place at = a_16x8_tf32(lane, reg);
            a[at.row][at.column] = float_of_bits(given[lane].a[reg] & mask);
        }
        for (int reg = 0; reg < 2; ++reg) {
            const Place at = b_8x8_tf32(lane, reg);
            b[at.row][at.column] = float_of_bits(given[lane].b[reg] & mask);
        }
    }
    gather_accumulators(given, d);
    multiply<8>(a, b, d);
    scatter_accumulators(d, taken);
}

template <class Given, class Compute>
void mma(const char* instruction, float* d, const std::uint32_t* a, const std::uint32_t* b, Compute compute) {
    require_full_warp(instruction);
    Given given;
    __builtin_memcpy(given.d, d, sizeof given.d);
    __builtin_memcpy(given.a, a, sizeof given.a);
    __builtin_memcpy(given.b, b, sizeof given.b);
    const Sums sums = rendezvous<Given, Sums>(instruction, given, [compute](const Given* all, Sums* taken) {
        ++counters.mma;
        compute(all, taken);
    });
    __builtin_memcpy(d, sums.d, sizeof sums.d);
}

}  // namespace detail

template <class Format>
void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b) {
    detail::mma<detail::Operands<4, 2>>(Format::m16n8k16, d, a, b, detail::compute_16bit<Format, 16>);
}

template <class Format>
void mma_m16n8k8(float* d, const std::uint32_t* a, const std::uint32_t* b) {
    detail::mma<detail::Operands<2, 1>>(Format::m16n8k8, d, a, b, detail::compute_16bit<Format, 8>);
}

inline void mma_m16n8k8_tf32(float* d, const std::uint32_t* a, const std::uint32_t* b) {
    detail::mma<detail::Operands<4, 2>>("mma.m16n8k8.tf32", d, a, b, detail::compute_32bit<detail::tf32_bits>);
}

inline void mma_m16n8k8_f32(float* d, const std::uint32_t* a, const std::uint32_t* b) {
    detail::mma<detail::Operands<4, 2>>("mma.m16n8k8.f32", d, a, b, detail::compute_32bit<~0u>);
}

namespace detail {

struct MatrixRow {
    std::uint32_t offset;  // in shared memory
    alignas(16) std::uint16_t elements[8];
};

struct MatrixRegisters {
    std::uint32_t r[4];
};

// The eight rows of a matrix are read at once, each from a group of four banks: two in one group, unless they are the
// same, take two turns.
PYADAPT_ARITHMETIC inline long matrix_conflicts(const MatrixRow* rows) {
    long conflicts = 0;
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < i; ++j) {
            const bool same_banks = rows[i].offset / 16 % 8 == rows[j].offset / 16 % 8;
            if (same_banks && rows[i].offset != rows[j].offset) {
                ++conflicts;
                break;
            }
        }
    return conflicts;
}

template <bool transposed>
PYADAPT_ARITHMETIC void spread_matrices(const MatrixRow* given, MatrixRegisters* taken, int count) {
    for (int matrix = 0; matrix < count; ++matrix) {
        const MatrixRow* rows = given + 8 * matrix;
        counters.ldmatrix_conflicts += matrix_conflicts(rows);
        for (int lane = 0; lane < lanes; ++lane) {
            std::uint32_t word = 0;
            for (int half = 0; half < 2; ++half) {
                const Place at = transposed ? matrix_8x8_transposed(lane, half) : matrix_8x8(lane, half);
                word |= static_cast<std::uint32_t>(rows[at.row].elements[at.column]) << (16 * half);
            }
            taken[lane].r[matrix] = word;
        }
    }
}

}  // namespace detail

// Each lane reads its own row, so that a race is seen as the lane's.
inline void ldmatrix(std::uint32_t* r, int count, const void* row, bool transposed) {
    using namespace detail;
    static constexpr const char* names[2][3] = {{"ldmatrix.x1", "ldmatrix.x2", "ldmatrix.x4"},
                                                {"ldmatrix.x1.trans", "ldmatrix.x2.trans", "ldmatrix.x4.trans"}};
    const char* name = names[transposed][count / 2];
    require_full_warp(name);
    MatrixRow given{};
    if (current->lane < 8 * count) {
        check_shared(row, 16, 16, name);
        given.offset = static_cast<std::uint32_t>(shared_offset(row));
        const auto* words = static_cast<const std::uint32_t*>(__builtin_assume_aligned(row, 16));
        std::uint32_t copy[4];
        for (int i = 0; i < 4; ++i) copy[i] = words[i];
        __builtin_memcpy(given.elements, copy, 16);
    }
    const auto taken = rendezvous<MatrixRow, MatrixRegisters>(
        name, given, [count, transposed](const MatrixRow* all, MatrixRegisters* registers) {
            ++counters.ldmatrix;
            if (transposed) spread_matrices<true>(all, registers, count);
            else spread_matrices<false>(all, registers, count);
        });
    __builtin_memcpy(r, taken.r, 4 * static_cast<std::size_t>(count));
}

}  // namespace pyadapt::emulator
