#include "int8.hpp"

#include "../core/weight.hpp"
#include "dispatch.hpp"

namespace pyadapt::cpu {

void quantize_rows(const Tensor& w, const Tensor& q, const Tensor& scale, int threads) {
    check_quantizing(w, q, scale);
    QuantizeRows job;
    job.rows = w.sizes[0];
    job.cols = w.sizes[1];
    job.w = w.data;
    job.w_dtype = w.dtype;
    job.w_stride = w.strides[0];
    job.q = static_cast<std::int8_t*>(q.data);
    job.q_stride = q.strides[0];
    job.scale = static_cast<float*>(scale.data);
    job.threads = threads;
    kernels().quantize_rows(job);
}

void dequantize_rows(const Tensor& q, const Tensor* scale, const Tensor& out, int threads) {
    check_dequantizing(q, scale, out);
    DequantizeRows job;
    job.rows = q.sizes[0];
    job.cols = q.sizes[1];
    job.q = static_cast<const std::int8_t*>(q.data);
    job.q_stride = q.strides[0];
    job.scale = scale ? static_cast<const float*>(scale->data) : nullptr;
    job.out = out.data;
    job.out_dtype = out.dtype;
    job.out_stride = out.strides[0];
    job.threads = threads;
    kernels().dequantize_rows(job);
}

}  // namespace pyadapt::cpu
