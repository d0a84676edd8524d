// One pass over a matrix and its columns: out = a scale + shift, and sum over m of a[m, n] b[m, n] on the way.
//
// The matrix is cut into blocks of rows and of columns that do not depend on the number of threads. A block sums into
// floats of its own, and the blocks' sums are added in their order: the same bits for any team.
#include "../core/workspace.hpp"
#include "kernels.hpp"
#include "rows.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {
namespace {

constexpr std::int64_t block_cols = 4096;        // of a block: its sums stay in L1
constexpr std::int64_t block_rows = 64;          // at least, of a block
constexpr std::int64_t most_blocks = 64;         // about as many as even out between busy cores
constexpr std::int64_t rows_at_once = 4;         // rows that share a load and a store of the sums
constexpr std::int64_t chunk = 512;              // elements converted at a time where dtypes differ
constexpr std::int64_t serial_work = 1 << 15;

std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t pieces(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// out = a scale + shift for one vector of columns.
PYADAPT_INLINE Floats scaled(const Columns& job, Floats a, std::int64_t col) {
    if (job.scale) a *= load<Floats>(job.scale + col);
    return job.shift ? a + load<Floats>(job.shift + col) : a;
}

// R rows from `row` on, columns [col, col + cols) but the rest of a vector, where a, b and out have one dtype.
template <DType dtype, int R>
void vectors(const Columns& job, std::int64_t row, std::int64_t col, std::int64_t cols, float* sums) {
    for (std::int64_t j = 0; j + width <= cols; j += width) {
        Floats sum = {};
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
            const Floats a = load_floats<dtype>(job.a, (row + i) * job.a_stride + col + j);
            if (job.b) sum += a * load_floats<dtype>(job.b, (row + i) * job.b_stride + col + j);
            if (job.out) store_floats<dtype>(job.out, (row + i) * job.out_stride + col + j, scaled(job, a, col + j));
        }
        if (job.b) store(sums + j, load<Floats>(sums + j) + sum);
    }
}

// One row in any dtypes.
void converted(const Columns& job, std::int64_t row, std::int64_t col, std::int64_t cols, float* sums) {
    float a[chunk], b[chunk];
    for (std::int64_t j = 0; j < cols; j += chunk) {
        const std::int64_t count = least(chunk, cols - j), at = col + j;
        widen(job.a, job.a_dtype, row * job.a_stride + at, count, a);
        if (job.b) {
            widen(job.b, job.b_dtype, row * job.b_stride + at, count, b);
            for (std::int64_t i = 0; i < count; ++i) sums[j + i] += a[i] * b[i];
        }
        if (!job.out) continue;
        if (job.scale)
            for (std::int64_t i = 0; i < count; ++i) a[i] *= job.scale[at + i];
        if (job.shift)
            for (std::int64_t i = 0; i < count; ++i) a[i] += job.shift[at + i];
        narrow(a, job.out, job.out_dtype, row * job.out_stride + at, count);
    }
}

template <DType dtype>
void block_as(const Columns& job, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols,
              float* sums) {
    std::int64_t i = 0;
    for (; i + rows_at_once <= rows; i += rows_at_once) vectors<dtype, rows_at_once>(job, row + i, col, cols, sums);
    for (; i < rows; ++i) vectors<dtype, 1>(job, row + i, col, cols, sums);
    const std::int64_t done = cols / width * width;
    if (done == cols) return;
    for (i = 0; i < rows; ++i) converted(job, row + i, col + done, cols - done, sums + done);
}

void block(const Columns& job, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols, float* sums) {
    if (job.b)
        for (std::int64_t j = 0; j < cols; ++j) sums[j] = 0.0f;
    const bool alike = (!job.b || job.b_dtype == job.a_dtype) && (!job.out || job.out_dtype == job.a_dtype);
    if (alike && job.a_dtype == DType::bf16) return block_as<DType::bf16>(job, row, rows, col, cols, sums);
    if (alike && job.a_dtype == DType::f16) return block_as<DType::f16>(job, row, rows, col, cols, sums);
    if (alike && job.a_dtype == DType::f32) return block_as<DType::f32>(job, row, rows, col, cols, sums);
    for (std::int64_t i = 0; i < rows; ++i) converted(job, row + i, col, cols, sums);
}

}  // namespace

void columns(const Columns& job) {
    // Tensors without elements have no memory: b may be null and the sums still be wanted.
    if (job.dot && job.rows == 0)
        for (std::int64_t n = 0; n < job.cols; ++n) job.dot[n] = 0.0f;
    if (job.rows == 0 || job.cols == 0) return;
    const std::int64_t across = pieces(job.cols, block_cols);
    const std::int64_t most = across < most_blocks ? most_blocks / across : 1;
    const std::int64_t height = pieces(job.rows, least(most, pieces(job.rows, block_rows)));
    const std::int64_t down = pieces(job.rows, height);
    // A single block of rows sums where the sums belong.
    float* memory = job.b && down > 1 ? workspace(down * job.cols) : job.dot;
    const auto run = [&](std::int64_t task) {
        const std::int64_t i = task / across, col = task % across * block_cols, row = i * height;
        float* sums = job.b ? memory + i * job.cols + col : nullptr;
        block(job, row, least(height, job.rows - row), col, least(block_cols, job.cols - col), sums);
    };
    const int team = job.rows * job.cols < serial_work ? 1 : job.threads;
    if (team == 1) {
        for (std::int64_t task = 0; task < down * across; ++task) run(task);
    } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
        for (std::int64_t task = 0; task < down * across; ++task) run(task);
    }
    if (!job.b || down == 1) return;
    for (std::int64_t n = 0; n < job.cols; ++n) job.dot[n] = 0.0f;
    for (std::int64_t i = 0; i < down; ++i)
        for (std::int64_t n = 0; n < job.cols; ++n) job.dot[n] += memory[i * job.cols + n];
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
