// Row-wise symmetric int8: scale = max |w| / 127, q = round to nearest even(w / scale).
#include "rows.hpp"

#include "kernels.hpp"

namespace pyadapt::cpu::PYADAPT_ISA {
namespace {

constexpr std::int64_t chunk = 512;  // elements widened at a time, on the stack
constexpr std::int64_t serial_work = 1 << 15;

// max |w| of a row; NaN where the row holds a NaN or an infinity.
float peak_of(const QuantizeRows& job, std::int64_t row) {
    float values[chunk];
    float peak = 0.0f;
    bool finite = true;
    for (std::int64_t k = 0; k < job.cols; k += chunk) {
        const std::int64_t count = job.cols - k < chunk ? job.cols - k : chunk;
        widen(job.w, job.w_dtype, row * job.w_stride + k, count, values);
        for (std::int64_t i = 0; i < count; ++i) {
            const float magnitude = __builtin_fabsf(values[i]);
            finite &= magnitude <= __FLT_MAX__;
            peak = magnitude > peak ? magnitude : peak;
        }
    }
    return finite ? peak : __builtin_nanf("");
}

void quantize_row(const QuantizeRows& job, std::int64_t row) {
    const float scale = peak_of(job, row) / 127.0f;
    job.scale[row] = scale;
    if (scale != scale) return;
    const float divisor = scale > 0.0f ? scale : 1.0f;
    // Adding and taking away 1.5 2^23 rounds to the nearest even integer.
    constexpr float magic = 12582912.0f;
    float values[chunk];
    for (std::int64_t k = 0; k < job.cols; k += chunk) {
        const std::int64_t count = job.cols - k < chunk ? job.cols - k : chunk;
        widen(job.w, job.w_dtype, row * job.w_stride + k, count, values);
        std::int8_t* q = job.q + row * job.q_stride + k;
        for (std::int64_t i = 0; i < count; ++i) {
            float value = values[i] / divisor;
            value = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value;
            q[i] = static_cast<std::int8_t>(static_cast<std::int32_t>((value + magic) - magic));
        }
    }
}

void dequantize_row(const DequantizeRows& job, std::int64_t row) {
    float values[chunk];
    for (std::int64_t k = 0; k < job.cols; k += chunk) {
        const std::int64_t count = job.cols - k < chunk ? job.cols - k : chunk;
        widen(job.q, DType::i8, row * job.q_stride + k, count, values);
        if (job.scale)
            for (std::int64_t i = 0; i < count; ++i) values[i] *= job.scale[row];
        narrow(values, job.out, job.out_dtype, row * job.out_stride + k, count);
    }
}

}  // namespace

void quantize_rows(const QuantizeRows& job) {
    const int team = job.rows * job.cols < serial_work ? 1 : job.threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (std::int64_t row = 0; row < job.rows; ++row) quantize_row(job, row);
}

void dequantize_rows(const DequantizeRows& job) {
    const int team = job.rows * job.cols < serial_work ? 1 : job.threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (std::int64_t row = 0; row < job.rows; ++row) dequantize_row(job, row);
}

}  // namespace pyadapt::cpu::PYADAPT_ISA
