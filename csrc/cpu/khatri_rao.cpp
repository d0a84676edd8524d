// LoHa's factors as those of a LoRA, and back: A[(i, j), k] = w1b[i, k] w2b[j, k], B[n, (i, j)] = s f[n] w1a[n, i]
// w2a[n, j], and the sums over i and over j of their gradients.
//
// A task is a few rows of B, or some columns of A with all its rows: every element of a result belongs to one task, so
// that the same bits come out for any number of threads.
#include <omp.h>

#include "../core/workspace.hpp"
#include "kernels.hpp"
#include "rows.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {
namespace {

constexpr std::int64_t strip = 256;        // columns of A in a task: a row of it stays in L1
constexpr std::int64_t block_rows = 64;    // rows of B in a task
constexpr std::int64_t serial_work = 1 << 15;

std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
std::int64_t pieces(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// s f[n]: what a row of B is multiplied by.
float factor_of(const KhatriRao& job, std::int64_t n) { return job.factors ? job.scaling * job.factors[n] : job.scaling; }

void make_columns(const KhatriRao& job, std::int64_t k, std::int64_t count) {
    float values[strip];
    for (std::int64_t i = 0; i < job.r1; ++i)
        for (std::int64_t j = 0; j < job.r2; ++j) {
            const float *left = job.w1b + i * job.K + k, *right = job.w2b + j * job.K + k;
            for (std::int64_t c = 0; c < count; ++c) values[c] = left[c] * right[c];
            narrow(values, job.A, job.dtype, (i * job.r2 + j) * job.K + k, count);
        }
}

void make_row(const KhatriRao& job, std::int64_t n, float* line) {
    const float *left = job.w1a + n * job.r1, *right = job.w2a + n * job.r2;
    for (std::int64_t i = 0; i < job.r1; ++i) {
        const float scaled = factor_of(job, n) * left[i];
        for (std::int64_t j = 0; j < job.r2; ++j) line[i * job.r2 + j] = scaled * right[j];
    }
    narrow(line, job.B, job.dtype, n * job.r1 * job.r2, job.r1 * job.r2);
}

void sum_columns(const KhatriRao& job, std::int64_t k, std::int64_t count) {
    float values[strip];
    for (std::int64_t i = 0; i < job.r1; ++i) __builtin_memset(job.dw1b + i * job.K + k, 0, count * sizeof(float));
    for (std::int64_t j = 0; j < job.r2; ++j) __builtin_memset(job.dw2b + j * job.K + k, 0, count * sizeof(float));
    for (std::int64_t i = 0; i < job.r1; ++i)
        for (std::int64_t j = 0; j < job.r2; ++j) {
            widen(job.A, job.dtype, (i * job.r2 + j) * job.K + k, count, values);
            const float *left = job.w1b + i * job.K + k, *right = job.w2b + j * job.K + k;
            float *to_left = job.dw1b + i * job.K + k, *to_right = job.dw2b + j * job.K + k;
            for (std::int64_t c = 0; c < count; ++c) to_left[c] += values[c] * right[c];
            for (std::int64_t c = 0; c < count; ++c) to_right[c] += values[c] * left[c];
        }
}

void sum_row(const KhatriRao& job, std::int64_t n, float* line) {
    const float *left = job.w1a + n * job.r1, *right = job.w2a + n * job.r2, scale = factor_of(job, n);
    float *to_left = job.dw1a + n * job.r1, *to_right = job.dw2a + n * job.r2;
    widen(job.B, job.dtype, n * job.r1 * job.r2, job.r1 * job.r2, line);
    for (std::int64_t j = 0; j < job.r2; ++j) to_right[j] = 0.0f;
    for (std::int64_t i = 0; i < job.r1; ++i) {
        float sum = 0.0f;
        for (std::int64_t j = 0; j < job.r2; ++j) {
            const float value = scale * line[i * job.r2 + j];
            sum += value * right[j];
            to_right[j] += value * left[i];
        }
        to_left[i] = sum;
    }
}

// Calls columns(k, count) for strips of A and row(n, line) for each row of B, shared out to a team.
template <class OfColumns, class OfRow>
void run(const KhatriRao& job, OfColumns columns, OfRow row) {
    const std::int64_t rank = job.r1 * job.r2, line_floats = (rank + width + 15) / 16 * 16;
    const std::int64_t strips = pieces(job.K, strip), tasks = strips + pieces(job.N, block_rows);
    const int team = rank * (job.K + job.N) < serial_work ? 1 : static_cast<int>(least(job.threads, tasks));
    float* memory = workspace((team > 0 ? team : 1) * line_floats);
    const auto task = [&](std::int64_t t, int thread) {
        if (t < strips) return columns(t * strip, least(strip, job.K - t * strip));
        const std::int64_t first = (t - strips) * block_rows, end = least(first + block_rows, job.N);
        for (std::int64_t n = first; n < end; ++n) row(n, memory + thread * line_floats);
    };
    if (team <= 1) {
        for (std::int64_t t = 0; t < tasks; ++t) task(t, 0);
        return;
    }
#pragma omp parallel for schedule(static, 1) num_threads(team)
    for (std::int64_t t = 0; t < tasks; ++t) task(t, omp_get_thread_num());
}

}  // namespace

void khatri_rao(const KhatriRao& job) {
    run(job, [&](std::int64_t k, std::int64_t count) { make_columns(job, k, count); },
        [&](std::int64_t n, float* line) { make_row(job, n, line); });
}

void khatri_rao_backward(const KhatriRao& job) {
    run(job, [&](std::int64_t k, std::int64_t count) { sum_columns(job, k, count); },
        [&](std::int64_t n, float* line) { sum_row(job, n, line); });
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
