// The product engine: out = left right' with a low-rank term, for every pass of a layer.
//
// The output is cut into tiles, one OpenMP task each. A task keeps its tile in fp32 in scratch memory and goes over the
// depth in blocks: pack the right side, pack the left side a slice at a time, let the micro-kernel add up. The low-rank
// term is one more, short block into the same tile, so that y or dx is written once. W is only ever unpacked a block at
// a time, whatever its dtype.
//
// The sum of an element is cut at the same places for any number of threads: results are the same bit by bit.
#include <omp.h>

#include "../core/workspace.hpp"
#include "tile.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {
namespace {

constexpr std::int64_t block_units = 256;                // depth of a block: the panels of a tile stay in L1
constexpr std::int64_t slice_rows = 16 * tile_rows;      // left rows packed at a time: they stay in L2
constexpr std::int64_t largest_rows = 3 * slice_rows;    // of a task's tile
constexpr std::int64_t largest_cols = 512;
constexpr std::int64_t narrow_size = 64;                 // up to this many rows or columns a product counts as narrow
constexpr std::int64_t serial_work = 1 << 17;            // multiply-adds below which a team costs more than it saves

std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t pieces(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// How the output is cut. Fewer, larger tiles pack less; the team must all have work.
struct Grid {
    std::int64_t tile_height, tile_width, down, across;
    std::int64_t tasks() const { return down * across; }
};

Grid cut(std::int64_t height, std::int64_t breadth, std::int64_t down, std::int64_t across) {
    const std::int64_t h = round_up(pieces(height, down), tile_rows), w = round_up(pieces(breadth, across), tile_cols);
    return {h, w, pieces(height, h), pieces(breadth, w)};
}

Grid make_grid(const Gemm& product) {
    if (product.rows == 0 || product.cols == 0) return {0, 0, 0, 0};
    Grid grid = cut(product.rows, product.cols, pieces(product.rows, largest_rows), pieces(product.cols, largest_cols));
    const std::int64_t threads = product.threads;
    // A product of rank r is short work with little to pack twice: many tasks even it out between busy cores.
    const bool narrow = least(product.rows, product.cols) <= narrow_size;
    const std::int64_t wanted = threads == 1 ? 1 : narrow ? 4 * threads : threads;
    while (grid.tasks() < wanted || 10 * grid.tasks() < 9 * pieces(grid.tasks(), threads) * threads) {
        const bool rows_left = grid.tile_height > tile_rows, cols_left = grid.tile_width > tile_cols;
        if (!rows_left && !cols_left) break;
        const bool halve_rows = rows_left && (!cols_left || grid.tile_height >= grid.tile_width);
        grid = halve_rows ? cut(product.rows, product.cols, 2 * grid.down, grid.across)
                          : cut(product.rows, product.cols, grid.down, 2 * grid.across);
    }
    return grid;
}

// The scratch memory of one thread.
struct Scratch {
    float* tile;   // (tile_height, tile_width)
    float* left;   // panels of a slice
    float* right;  // panels of a block
    float* line;   // a row of the tile
    float* bias;

    static std::int64_t left_floats() { return slice_rows / tile_rows * left_panels.stride * block_units; }
    static std::int64_t floats(const Grid& grid) {
        return grid.tile_height * grid.tile_width + left_floats() + grid.tile_width * block_units + 2 * grid.tile_width;
    }
    Scratch(float* memory, const Grid& grid) {
        tile = memory;
        left = tile + grid.tile_height * grid.tile_width;
        right = left + left_floats();
        line = right + grid.tile_width * block_units;
        bias = line + grid.tile_width;
    }
};

// bf16 pairs where the instruction set has them.
#if PYADAPT_PAIRS
constexpr Unit paired = Unit::bf16_pair;
#else
constexpr Unit paired = Unit::fp32;
#endif

bool is_short(const Operand& side) { return side.dtype == DType::bf16 || side.dtype == DType::i8; }

// One tile of the output.
struct Task {
    const Gemm& product;
    const Scratch& scratch;
    std::int64_t row, rows, col, cols, stride;

    float* at(std::int64_t i) const { return scratch.tile + i * stride; }

    // tile += left right' over the whole depth of the two operands.
    void add_product(const Operand& left, const Operand& right, std::int64_t depth, Unit unit) const {
        const std::int64_t block_steps = unit == Unit::fp32 ? block_units : 2 * block_units;
        for (std::int64_t p = 0; p < depth; p += block_steps) {
            const std::int64_t steps = least(block_steps, depth - p), units = units_of(steps, unit);
            pack(right, unit, {col, cols, p, steps}, right_panels, scratch.right);
            for (std::int64_t i = 0; i < rows; i += slice_rows) {
                const std::int64_t slice = least(slice_rows, rows - i);
                pack(left, unit, {row + i, slice, p, steps}, left_panels, scratch.left);
                multiply_slice(unit, units, i, slice);
            }
        }
    }

    // The right panel stays in L1 while the panels of the slice stream past it.
    void multiply_slice([[maybe_unused]] Unit unit, std::int64_t units, std::int64_t first, std::int64_t slice) const {
        for (std::int64_t j = 0; j < cols; j += tile_cols) {
            const float* right = scratch.right + j * units;
            for (std::int64_t i = 0; i < slice; i += tile_rows) {
                const float* left = scratch.left + i / tile_rows * left_panels.stride * units;
                const std::int64_t tall = least(tile_rows, slice - i), wide = least(tile_cols, cols - j);
#if PYADAPT_PAIRS
                if (unit == Unit::bf16_pair) {
                    tile_kernel<Unit::bf16_pair>(tall, wide)(units, left, right, at(first + i) + j, stride);
                    continue;
                }
#endif
                tile_kernel<Unit::fp32>(tall, wide)(units, left, right, at(first + i) + j, stride);
            }
        }
    }

    void add_low_rank() const {
        if (!product.rank) return;
        // Both sides are rounded where the output keeps no more.
        const Unit unit = product.out_dtype == DType::bf16 ? paired : Unit::fp32;
        add_product(product.low_left, product.low_right, product.rank, unit);
    }

    void add_main() const {
        if (product.add_out) {
            for (std::int64_t i = 0; i < rows; ++i) {
                widen(product.out, product.out_dtype, (row + i) * product.out_stride + col, cols, scratch.line);
                for (std::int64_t j = 0; j < cols; ++j) at(i)[j] += scratch.line[j];
            }
        }
        if (product.depth) add_product(product.left, product.right, product.depth, main_unit());
    }

    // bf16 pairs where both sides hold no more bits than bf16 does, or one of them and the other may be rounded.
    Unit main_unit() const {
        const bool left = is_short(product.left), right = is_short(product.right);
        return (left && right) || (product.rounds && (left || right)) ? paired : Unit::fp32;
    }

    void scale() const {
        if (product.alpha == 1.0f && !product.col_scale) return;
        for (std::int64_t j = 0; j < cols; ++j)
            scratch.line[j] = product.alpha * (product.col_scale ? product.col_scale[col + j] : 1.0f);
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t j = 0; j < cols; ++j) at(i)[j] *= scratch.line[j];
    }

    void write() const {
        if (product.bias) widen(product.bias, product.bias_dtype, col, cols, scratch.bias);
        for (std::int64_t i = 0; i < rows; ++i) {
            if (product.bias)
                for (std::int64_t j = 0; j < cols; ++j) at(i)[j] += scratch.bias[j];
            narrow(at(i), product.out, product.out_dtype, (row + i) * product.out_stride + col, cols);
        }
    }

    void run() const {
        __builtin_memset(scratch.tile, 0, rows * stride * sizeof(float));
        if (product.low_dropout) {
            // dx: the mask belongs to the low-rank term alone, which therefore comes first.
            add_low_rank();
            for (std::int64_t i = 0; i < rows; ++i) drop(*product.low_dropout, row + i, col, cols, at(i));
            add_main();
            scale();
        } else {
            // Forward: the scale of an int8 weight belongs to the main product alone.
            add_main();
            scale();
            add_low_rank();
        }
        write();
    }
};

}  // namespace

void gemm(const Gemm* products, int count) {
    Grid grids[most_products];
    std::int64_t tasks = 0, work = 0, share = 0;
    for (int i = 0; i < count; ++i) {
        const Gemm& product = products[i];
        grids[i] = make_grid(product);
        tasks += grids[i].tasks();
        work += product.rows * product.cols * (product.depth + product.rank + 1);
        const std::int64_t floats = round_up(Scratch::floats(grids[i]), 16);
        share = floats > share ? floats : share;
    }
    if (tasks == 0) return;
    const int team = work < serial_work ? 1 : static_cast<int>(least(products[0].threads, tasks));
    float* memory = workspace(team * share);
    const auto run = [&](std::int64_t task, int thread) {
        std::int64_t t = task;
        int i = 0;
        while (t >= grids[i].tasks()) t -= grids[i++].tasks();
        const Gemm& product = products[i];
        const Grid& grid = grids[i];
        const Scratch scratch(memory + thread * share, grid);
        const std::int64_t row = t % grid.down * grid.tile_height, col = t / grid.down * grid.tile_width;
        Task{product, scratch, row, least(grid.tile_height, product.rows - row), col,
             least(grid.tile_width, product.cols - col), grid.tile_width}
            .run();
    };
    // Entering a parallel region costs more than a small product, even with a team of one.
    if (team == 1) {
        for (std::int64_t task = 0; task < tasks; ++task) run(task, 0);
        return;
    }
    // In the order given, so that the small tasks of a last product fill the gaps that the large ones leave.
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (std::int64_t task = 0; task < tasks; ++task) run(task, omp_get_thread_num());
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
