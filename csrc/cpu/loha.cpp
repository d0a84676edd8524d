#include "loha.hpp"

#include "../core/checks.hpp"
#include "dispatch.hpp"
#include "operands.hpp"

namespace pyadapt::cpu {
namespace {

KhatriRao job_of(const LohaFactors& factors, const Tensor& A, const Tensor& B, int threads) {
    check_two_dimensional(*factors.w1a);
    check_two_dimensional(*factors.w1b);
    check_two_dimensional(*factors.w2b);
    KhatriRao job;
    job.N = factors.w1a->sizes[0];
    job.r1 = factors.w1b->sizes[0];
    job.K = factors.w1b->sizes[1];
    job.r2 = factors.w2b->sizes[0];
    check_dense_fp32(*factors.w1a, {"N", job.N}, {"r1", job.r1});
    check_dense_fp32(*factors.w1b, {"r1", job.r1}, {"K", job.K});
    check_dense_fp32(*factors.w2a, {"N", job.N}, {"r2", job.r2});
    check_dense_fp32(*factors.w2b, {"r2", job.r2}, {"K", job.K});
    if (factors.rows) check_vector_fp32(*factors.rows, {"N", job.N});
    check_dtype(B, A.dtype);
    check_dense(A, {"r1 r2", job.r1 * job.r2}, {"K", job.K});
    check_dense(B, {"N", job.N}, {"r1 r2", job.r1 * job.r2});
    job.w1a = floats(factors.w1a);
    job.w1b = floats(factors.w1b);
    job.w2a = floats(factors.w2a);
    job.w2b = floats(factors.w2b);
    job.factors = floats(factors.rows);
    job.scaling = static_cast<float>(factors.scaling);
    job.A = A.data;
    job.B = B.data;
    job.dtype = A.dtype;
    job.threads = threads;
    return job;
}

}  // namespace

void khatri_rao(const LohaFactors& factors, const Tensor& A, const Tensor& B, int threads) {
    kernels().khatri_rao(job_of(factors, A, B, threads));
}

void khatri_rao_backward(const Tensor& dA, const Tensor& dB, const LohaFactors& factors, const Tensor& dw1a,
                         const Tensor& dw1b, const Tensor& dw2a, const Tensor& dw2b, int threads) {
    KhatriRao job = job_of(factors, dA, dB, threads);
    check_dense_fp32(dw1a, {"N", job.N}, {"r1", job.r1});
    check_dense_fp32(dw1b, {"r1", job.r1}, {"K", job.K});
    check_dense_fp32(dw2a, {"N", job.N}, {"r2", job.r2});
    check_dense_fp32(dw2b, {"r2", job.r2}, {"K", job.K});
    job.dw1a = floats(dw1a);
    job.dw1b = floats(dw1b);
    job.dw2a = floats(dw2a);
    job.dw2b = floats(dw2b);
    kernels().khatri_rao_backward(job);
}

}  // namespace pyadapt::cpu
