#include "int8.hpp"

#include "../core/checks.hpp"
#include "dispatch.hpp"

namespace pyadapt::cpu {

void quantize_rows(const Tensor& w, const Tensor& q, const Tensor& scale, int threads) {
    const std::int64_t N = w.sizes[0], K = w.sizes[1];
    check_shape(w, {"N", N}, {"K", K});
    check_floating(w);
    check_rows(w);
    check_shape(q, {"N", N}, {"K", K});
    check_dtype(q, DType::i8);
    check_output(q);
    check_shape(scale, {"N", N});
    check_dtype(scale, DType::f32);
    check_output(scale);
    QuantizeRows job;
    job.rows = N;
    job.cols = K;
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
    const std::int64_t N = q.sizes[0], K = q.sizes[1];
    check_shape(q, {"N", N}, {"K", K});
    check_dtype(q, DType::i8);
    check_rows(q);
    if (scale) {
        check_shape(*scale, {"N", N});
        check_dtype(*scale, DType::f32);
        check_rows(*scale);
    }
    check_shape(out, {"N", N}, {"K", K});
    check_floating(out);
    check_output(out);
    DequantizeRows job;
    job.rows = N;
    job.cols = K;
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
