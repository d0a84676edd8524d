// Many small products in one team: the low-rank passes of a batch in which each segment of rows has its own adapter.
//
// A product is cut into tiles, and the tiles of all products are the tasks of one OpenMP region, with a barrier between
// its stages. A task keeps its tile in fp32 and writes it once. Where a segment has more rows, its products go through
// packed panels and the engine's micro-kernel; for a few rows (decoding) they read the adapter once, where it lies, for
// packing would cost more than the product.
//
// The sum of an element is cut at the same depths whatever its tile: the same bits for any number of threads.
#include <omp.h>

#include "../core/workspace.hpp"
#include "tile.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {
namespace {

constexpr std::int64_t packed_steps = 256;            // depth of a packed block
constexpr std::int64_t direct_steps = max_run;        // depth of a block that is read where it lies
constexpr std::int64_t few_rows = 4;                  // up to this many rows nothing is packed
constexpr std::int64_t largest_rows = 16 * tile_rows;  // of a task's tile
constexpr std::int64_t largest_cols = 512;
constexpr std::int64_t serial_work = 1 << 17;         // multiply-adds below which a team costs more than it saves
constexpr std::int64_t direct_stride = direct_steps + 2 * width;

std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t pieces(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

struct TileSize {
    std::int64_t rows, cols;
};

std::int64_t tasks_of(const SegmentProduct& product, TileSize size) {
    return pieces(product.rows, size.rows) * pieces(product.cols, size.cols);
}

std::int64_t tasks_of(const SegmentStage& stage, TileSize size) {
    std::int64_t tasks = 0;
    for (std::int64_t i = 0; i < stage.count; ++i) tasks += tasks_of(stage.products[i], size);
    return tasks;
}

std::int64_t depth_of(const SegmentProduct& product) {
    std::int64_t depth = 0;
    for (std::int64_t range = 0; range < product.ranges; ++range) depth += product.steps[range].count;
    return depth;
}

// Large tiles pack less; several a thread even out segments of different lengths.
TileSize choose_size(const SegmentStage& stage, int threads) {
    TileSize size = {tile_rows, tile_cols};
    for (std::int64_t i = 0; i < stage.count; ++i) {
        const std::int64_t rows = round_up(least(stage.products[i].rows, largest_rows), tile_rows);
        const std::int64_t cols = round_up(least(stage.products[i].cols, largest_cols), tile_cols);
        size = {rows > size.rows ? rows : size.rows, cols > size.cols ? cols : size.cols};
    }
    while (threads > 1 && tasks_of(stage, size) < 4 * threads) {
        const bool rows_left = size.rows > tile_rows, cols_left = size.cols > tile_cols;
        if (!rows_left && !cols_left) break;
        if (rows_left && (!cols_left || size.rows >= size.cols)) size.rows = round_up(size.rows / 2, tile_rows);
        else size.cols = round_up(size.cols / 2, tile_cols);
    }
    return size;
}

// The scratch memory of one thread.
struct Scratch {
    float* tile;   // (rows, cols) of a tile
    float* left;   // packed panels, or a few rows as they are
    float* right;  // packed panels, or four rows as they are
    float* line;   // a row of the tile

    static std::int64_t left_floats(TileSize size) {
        const std::int64_t packed = size.rows / tile_rows * left_panels.stride * packed_steps;
        return packed > few_rows * direct_stride ? packed : few_rows * direct_stride;
    }
    static std::int64_t right_floats(TileSize size) {
        return size.cols * packed_steps > 4 * direct_stride ? size.cols * packed_steps : 4 * direct_stride;
    }
    static std::int64_t floats(TileSize size) {
        return size.rows * size.cols + left_floats(size) + right_floats(size) + size.cols;
    }
    Scratch(float* memory, TileSize size) {
        tile = memory;
        left = tile + size.rows * size.cols;
        right = left + left_floats(size);
        line = right + right_floats(size);
    }
};

// --- a few rows, nothing packed ---

PYADAPT_INLINE Quad fold(Floats v) {
#if PYADAPT_WIDTH == 4
    return v;
#elif PYADAPT_WIDTH == 8
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return (__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7)) +
           (__builtin_shufflevector(v, v, 8, 9, 10, 11) + __builtin_shufflevector(v, v, 12, 13, 14, 15));
#endif
}

// The dot products of one row with four, over a multiple of four steps.
PYADAPT_INLINE Quad dot_four(const float* left, const float* const* right, std::int64_t steps) {
    Floats wide[4] = {};
    std::int64_t p = 0;
    for (; p + width <= steps; p += width) {
        const Floats l = load<Floats>(left + p);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) wide[j] += l * load<Floats>(right[j] + p);
    }
    Quad sums[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = fold(wide[j]);
    for (; p < steps; p += 4) {
        const Quad l = load<Quad>(left + p);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] += l * load<Quad>(right[j] + p);
    }
    float across[16];
    transpose_4x4(reinterpret_cast<const float*>(sums), 4, across, 4);
    return (load<Quad>(across) + load<Quad>(across + 4)) + (load<Quad>(across + 8) + load<Quad>(across + 12));
}

// tile += left right' where the rows of right run along the depth.
void add_dots(const Operand& right, const Steps& block, std::int64_t rows, std::int64_t col, std::int64_t cols,
              std::int64_t stride, const Scratch& scratch) {
    const std::int64_t steps = round_up(block.count, 4);
    const bool in_place = right.dtype == DType::f32 && steps == block.count;
    for (std::int64_t j = 0; j < cols; j += 4) {
        const std::int64_t some = least(4, cols - j);
        const float* at[4];
        for (std::int64_t q = 0; q < 4; ++q) {
            if (q >= some) {
                at[q] = at[0];  // read, and not used
                continue;
            }
            const std::int64_t offset = (col + j + q) * right.row_stride + block.first;
            if (in_place) {
                at[q] = static_cast<const float*>(right.data) + offset;
                continue;
            }
            float* copy = scratch.right + q * direct_stride;
            widen(right.data, right.dtype, offset, block.count, copy);
            for (std::int64_t p = block.count; p < steps; ++p) copy[p] = 0.0f;
            at[q] = copy;
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            const Quad sums = dot_four(scratch.left + i * direct_stride, at, steps);
            float* to = scratch.tile + i * stride + j;  // the tile's rows are whole quads
            store(to, load<Quad>(to) + sums);
        }
    }
}

template <DType dtype>
void add_multiples_as(const Operand& right, const Steps& block, std::int64_t rows, std::int64_t col, std::int64_t cols,
                      std::int64_t stride, const Scratch& scratch) {
    for (std::int64_t j = 0; j < cols; j += width) {
        const std::int64_t rest = cols - j;
        const auto right_at = [&](std::int64_t p) __attribute__((always_inline)) {
            const std::int64_t at = (block.first + p) * right.depth_stride + col + j;
            return rest >= width ? load_floats<dtype>(right.data, at) : load_tail<dtype>(right.data, at, rest);
        };
        if (rows == 1) {
            // Four chains of multiply-adds at once: one alone waits for itself.
            Floats parts[4] = {load<Floats>(scratch.tile + j)};
            std::int64_t p = 0;
            for (; p + 4 <= block.count; p += 4)
#pragma GCC unroll 4
                for (int q = 0; q < 4; ++q) parts[q] += broadcast(scratch.left[p + q]) * right_at(p + q);
            for (; p < block.count; ++p) parts[0] += broadcast(scratch.left[p]) * right_at(p);
            store(scratch.tile + j, (parts[0] + parts[1]) + (parts[2] + parts[3]));
            continue;
        }
        Floats sums[few_rows];
        for (std::int64_t i = 0; i < rows; ++i) sums[i] = load<Floats>(scratch.tile + i * stride + j);
        for (std::int64_t p = 0; p < block.count; ++p) {
            const Floats r = right_at(p);
            for (std::int64_t i = 0; i < rows; ++i) sums[i] += broadcast(scratch.left[i * direct_stride + p]) * r;
        }
        for (std::int64_t i = 0; i < rows; ++i) store(scratch.tile + i * stride + j, sums[i]);
    }
}

// tile += left right' where the depth steps of right run along its rows.
void add_multiples(const Operand& right, const Steps& block, std::int64_t rows, std::int64_t col, std::int64_t cols,
                   std::int64_t stride, const Scratch& scratch) {
    switch (right.dtype) {
        case DType::bf16: return add_multiples_as<DType::bf16>(right, block, rows, col, cols, stride, scratch);
        case DType::f16: return add_multiples_as<DType::f16>(right, block, rows, col, cols, stride, scratch);
        default: return add_multiples_as<DType::f32>(right, block, rows, col, cols, stride, scratch);
    }
}

// out = alpha left right' over up to few_rows steps, row by row, straight into the output: left and right hold a step a
// line, as they are.
template <DType dtype>
void write_outer_as(const SegmentProduct& product, std::int64_t row, std::int64_t rows, std::int64_t col,
                    std::int64_t cols, std::int64_t steps, const Scratch& scratch) {
    for (std::int64_t i = 0; i < rows; ++i) {
        Floats left[few_rows];
        for (std::int64_t p = 0; p < steps; ++p)
            left[p] = broadcast(product.alpha * scratch.left[p * direct_stride + i]);
        const std::int64_t to = (row + i) * product.out_stride + col;
        for (std::int64_t j = 0; j < cols; j += width) {
            Floats sum = {};
            for (std::int64_t p = 0; p < steps; ++p)
                sum += left[p] * load<Floats>(scratch.right + p * direct_stride + j);
            if (cols - j >= width) store_floats<dtype>(product.out, to + j, sum);
            else store_tail<dtype>(product.out, to + j, cols - j, sum);
        }
    }
}

void write_outer(const SegmentProduct& product, std::int64_t row, std::int64_t rows, std::int64_t col,
                 std::int64_t cols, std::int64_t steps, const Scratch& scratch) {
    switch (product.out_dtype) {
        case DType::bf16: return write_outer_as<DType::bf16>(product, row, rows, col, cols, steps, scratch);
        case DType::f16: return write_outer_as<DType::f16>(product, row, rows, col, cols, steps, scratch);
        default: return write_outer_as<DType::f32>(product, row, rows, col, cols, steps, scratch);
    }
}

// --- one tile of the output ---

struct Task {
    const SegmentProduct& product;
    const Scratch& scratch;
    std::int64_t row, rows, col, cols, stride;

    float* at(std::int64_t i) const { return scratch.tile + i * stride; }

    void add_direct(const Steps& block) const {
        const std::int64_t padded = round_up(block.count, 4);
        for (std::int64_t i = 0; i < rows; ++i) {
            float* values = scratch.left + i * direct_stride;
            widen_run(product.left, row + i, block.first, block.count, values);
            for (std::int64_t p = block.count; p < padded; ++p) values[p] = 0.0f;
        }
        const auto add = product.right.along_depth ? add_dots : add_multiples;
        add(product.right, block, rows, col, cols, stride, scratch);
    }

    void add_packed(const Steps& block) const {
        const std::int64_t units = block.count;
        pack(product.right, Unit::fp32, {col, cols, block.first, units}, right_panels, scratch.right);
        pack(product.left, Unit::fp32, {row, rows, block.first, units}, left_panels, scratch.left);
        for (std::int64_t j = 0; j < cols; j += tile_cols) {
            for (std::int64_t i = 0; i < rows; i += tile_rows) {
                const float* left = scratch.left + i / tile_rows * left_panels.stride * units;
                const std::int64_t tall = least(tile_rows, rows - i), wide = least(tile_cols, cols - j);
                tile_kernel<Unit::fp32>(tall, wide)(units, left, scratch.right + j * units, at(i) + j, stride);
            }
        }
    }

    // An adapter's sum over a few rows: all of its steps at once.
    void run_outer() const {
        std::int64_t steps = 0;
        for (std::int64_t range = 0; range < product.ranges; ++range) {
            for (std::int64_t p = 0; p < product.steps[range].count; ++p, ++steps) {
                const std::int64_t depth = product.steps[range].first + p;
                widen_run(product.left, row, depth, rows, scratch.left + steps * direct_stride);
                widen_run(product.right, col, depth, cols, scratch.right + steps * direct_stride);
            }
        }
        write_outer(product, row, rows, col, cols, steps, scratch);
    }

    void run() const {
        if (is_outer()) return run_outer();
        __builtin_memset(scratch.tile, 0, rows * stride * sizeof(float));
        const bool direct = product.rows <= few_rows && product.left.along_depth;
        const std::int64_t longest = direct ? direct_steps : packed_steps;
        for (std::int64_t range = 0; range < product.ranges; ++range) {
            const Steps& steps = product.steps[range];
            for (std::int64_t p = 0; p < steps.count; p += longest) {
                const Steps block = {steps.first + p, least(longest, steps.count - p)};
                direct ? add_direct(block) : add_packed(block);
            }
        }
        for (std::int64_t i = 0; i < rows; ++i) finish(i);
    }

    bool is_outer() const {
        const bool by_steps = !product.left.along_depth && !product.right.along_depth;
        return by_steps && !product.mask && !product.add_out && depth_of(product) <= few_rows;
    }

    void finish(std::int64_t i) const {
        float* values = at(i);
        const std::int64_t to = (row + i) * product.out_stride + col;
        if (product.alpha != 1.0f)
            for (std::int64_t j = 0; j < cols; ++j) values[j] *= product.alpha;
        if (product.mask) drop(*product.mask, row + i, col, cols, values);
        if (product.add_out) {
            widen(product.out, product.out_dtype, to, cols, scratch.line);
            for (std::int64_t j = 0; j < cols; ++j) values[j] += scratch.line[j];
        }
        narrow(values, product.out, product.out_dtype, to, cols);
    }
};

// The product that a task belongs to: the last one that starts at or before it and has tasks.
const SegmentProduct& owner_of(std::int64_t task, const SegmentStage& stage) {
    std::int64_t low = 0, high = stage.count;
    while (high - low > 1) {
        const std::int64_t middle = (low + high) / 2;
        (stage.products[middle].first_task <= task ? low : high) = middle;
    }
    return stage.products[low];
}

}  // namespace

void segments(const SegmentStage* stages, int count, int threads) {
    TileSize sizes[most_stages];
    std::int64_t tasks[most_stages], most = 0, work = 0, share = 0;
    for (int i = 0; i < count; ++i) {
        const SegmentStage& stage = stages[i];
        sizes[i] = choose_size(stage, threads);
        tasks[i] = 0;
        for (std::int64_t j = 0; j < stage.count; ++j) {
            SegmentProduct& product = stage.products[j];
            product.first_task = tasks[i];
            tasks[i] += tasks_of(product, sizes[i]);
            work += product.rows * product.cols * (depth_of(product) + 1);
        }
        const std::int64_t floats = round_up(Scratch::floats(sizes[i]), 16);
        share = floats > share ? floats : share;
        most = tasks[i] > most ? tasks[i] : most;
    }
    if (most == 0) return;
    const int team = work < serial_work ? 1 : static_cast<int>(least(threads, most));
    float* memory = workspace(team * share);
#pragma omp parallel num_threads(team) if (team > 1)
    for (int i = 0; i < count; ++i) {
        const TileSize size = sizes[i];
        const Scratch scratch(memory + omp_get_thread_num() * share, size);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t task = 0; task < tasks[i]; ++task) {
            const SegmentProduct& product = owner_of(task, stages[i]);
            const std::int64_t t = task - product.first_task, across = pieces(product.cols, size.cols);
            const std::int64_t row = t / across * size.rows, col = t % across * size.cols;
            const std::int64_t rows = least(size.rows, product.rows - row), cols = least(size.cols, product.cols - col);
            Task{product, scratch, product.row + row, rows, col, cols, round_up(cols, tile_cols)}.run();
        }
    }
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
