// Packing: a block of an operand becomes micro-panels, in the order in which the micro-kernel reads them.
//
// A panel holds a few rows of the operand; unit u of row i lies at panel[u * stride + i]. A unit is 32 bits: one fp32
// step of the depth, or a pair of bf16 steps (low half first). Rows and steps beyond the block are zeros.
#pragma once

#include "kernels.hpp"
#include "rows.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {

enum class Unit { fp32, bf16_pair };

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
constexpr std::int64_t units_of(std::int64_t depth, Unit unit) { return unit == Unit::fp32 ? depth : (depth + 1) / 2; }

// How the panels of one side lie in memory.
struct PanelShape {
    std::int64_t rows;    // of the operand, in one panel
    std::int64_t stride;  // floats from one unit to the next: rows, rounded up to whole quads
};

// A part of an operand: rows [row, row + rows), depth steps [depth, depth + steps).
struct Block {
    std::int64_t row, rows, depth, steps;
};

// The longest run that packing handles at once, in elements: rows of a panel are widened into scratch of this size.
constexpr std::int64_t max_run = 512;

typedef float Quad __attribute__((vector_size(16)));

// to[u * lanes + i] = from[i * from_stride + u] for four rows i and four units u.
PYADAPT_INLINE void transpose_4x4(const float* from, std::int64_t from_stride, float* to, std::int64_t lanes) {
    const Quad r0 = load<Quad>(from), r1 = load<Quad>(from + from_stride);
    const Quad r2 = load<Quad>(from + 2 * from_stride), r3 = load<Quad>(from + 3 * from_stride);
    const Quad a = __builtin_shufflevector(r0, r1, 0, 4, 1, 5), b = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
    const Quad c = __builtin_shufflevector(r0, r1, 2, 6, 3, 7), d = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
    store(to, __builtin_shufflevector(a, b, 0, 1, 4, 5));
    store(to + lanes, __builtin_shufflevector(a, b, 2, 3, 6, 7));
    store(to + 2 * lanes, __builtin_shufflevector(c, d, 0, 1, 4, 5));
    store(to + 3 * lanes, __builtin_shufflevector(c, d, 2, 3, 6, 7));
}

// A run of an operand in fp32: `count` elements along its axis of unit stride, scaled and dropped.
static void widen_run(const Operand& from, std::int64_t row, std::int64_t depth, std::int64_t count, float* to) {
    widen(from.data, from.dtype, row * from.row_stride + depth * from.depth_stride, count, to);
    if (from.depth_scale) {
        for (std::int64_t i = 0; i < count; ++i) to[i] *= from.depth_scale[from.along_depth ? depth + i : depth];
    }
    if (from.alpha != 1.0f)
        for (std::int64_t i = 0; i < count; ++i) to[i] *= from.alpha;
    if (from.dropout && from.along_depth) drop(*from.dropout, row, depth, count, to);
    else if (from.dropout) drop(*from.dropout, depth, row, count, to);
}

// fp32 scratch to bf16 in place of its first half; the odd step is padded with zero.
static void narrow_to_pairs(float* run, std::int64_t count) {
    auto* halves = reinterpret_cast<std::uint16_t*>(run);
    for (std::int64_t i = 0; i < count; i += width) store(halves + i, to_bf16(load<Floats>(run + i)));
    if (count % 2) __builtin_memset(halves + count, 0, sizeof *halves);
}

static bool is_plain_bf16(const Operand& from) {
    return from.dtype == DType::bf16 && !from.depth_scale && !from.dropout && from.alpha == 1.0f;
}

// One panel whose rows are runs along the depth: widen each row, then transpose.
static void pack_panel(const Operand& from, Unit unit, const Block& block, std::int64_t stride, float* panel) {
    constexpr std::int64_t run_stride = max_run + 2 * width;
    alignas(64) float runs[4][run_stride];
    const std::int64_t units = units_of(block.steps, unit);
    for (std::int64_t i = 0; i < stride; i += 4) {
        for (std::int64_t j = 0; j < 4; ++j) {
            const std::int64_t row = block.row + i + j;
            if (i + j >= block.rows) {
                __builtin_memset(runs[j], 0, units * sizeof(float));
            } else if (unit == Unit::bf16_pair && is_plain_bf16(from)) {
                const auto* at = static_cast<const std::uint16_t*>(from.data) + row * from.row_stride + block.depth;
                runs[j][units - 1] = 0.0f;  // the pad of an odd depth
                __builtin_memcpy(runs[j], at, block.steps * sizeof *at);
            } else {
                widen_run(from, row, block.depth, block.steps, runs[j]);
                if (unit == Unit::bf16_pair) narrow_to_pairs(runs[j], block.steps);
            }
        }
        std::int64_t u = 0;
        for (; u + 4 <= units; u += 4) transpose_4x4(runs[0] + u, run_stride, panel + u * stride + i, stride);
        for (; u < units; ++u)
            for (std::int64_t j = 0; j < 4; ++j) panel[u * stride + i + j] = runs[j][u];
    }
}

// A block whose depth steps are runs along the rows: each run is dealt out to the panels.
static void pack_columns(const Operand& from, Unit unit, const Block& block, const PanelShape& shape, float* panels) {
    alignas(64) float low[max_run + 2 * width], high[max_run + 2 * width];
    const std::int64_t panel_floats = units_of(block.steps, unit) * shape.stride;
    const std::int64_t step = unit == Unit::fp32 ? 1 : 2;
    const std::int64_t longest = max_run / shape.rows * shape.rows;
    for (std::int64_t first = 0; first < block.rows; first += longest) {
        const std::int64_t run = block.rows - first < longest ? block.rows - first : longest;
        const std::int64_t padded = round_up(run, shape.rows);
        const std::int64_t row = block.row + first;
        for (std::int64_t p = 0; p < block.steps; p += step) {
            widen_run(from, row, block.depth + p, run, low);
            for (std::int64_t i = run; i < padded; ++i) low[i] = 0.0f;
            if (unit == Unit::bf16_pair) {
                const std::int64_t second = p + 1 < block.steps ? run : 0;
                if (second) widen_run(from, row, block.depth + p + 1, run, high);
                for (std::int64_t i = second; i < padded; ++i) high[i] = 0.0f;
                for (std::int64_t i = 0; i < padded; i += width) {
                    const Words low_bits = __builtin_convertvector(to_bf16(load<Floats>(low + i)), Words);
                    const Words high_bits = __builtin_convertvector(to_bf16(load<Floats>(high + i)), Words);
                    store(low + i, low_bits | (high_bits << 16));
                }
            }
            float* to = panels + first / shape.rows * panel_floats + p / step * shape.stride;
            for (std::int64_t i = 0; i < run; i += shape.rows, to += panel_floats)
                __builtin_memcpy(to, low + i, shape.rows * sizeof(float));
        }
    }
}

// All panels of a block, one after another.
static void pack(const Operand& from, Unit unit, const Block& block, const PanelShape& shape, float* panels) {
    if (!from.along_depth) return pack_columns(from, unit, block, shape, panels);
    const std::int64_t panel_floats = units_of(block.steps, unit) * shape.stride;
    for (std::int64_t i = 0; i < block.rows; i += shape.rows, panels += panel_floats) {
        const std::int64_t rows = block.rows - i < shape.rows ? block.rows - i : shape.rows;
        pack_panel(from, unit, {block.row + i, rows, block.depth, block.steps}, shape.stride, panels);
    }
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
