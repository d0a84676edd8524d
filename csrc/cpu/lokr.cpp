#include "lokr.hpp"

#include "../core/checks.hpp"
#include "../core/error.hpp"
#include "dispatch.hpp"
#include "operands.hpp"

namespace pyadapt::cpu {
namespace {

Kron kron(const Tensor& x, const LokrTerm& term, int threads) {
    Kron job;
    check_two_dimensional(*term.w1);
    check_two_dimensional(*term.down);
    job.a = term.w1->sizes[0];
    job.c = term.w1->sizes[1];
    job.h = term.down->sizes[0];
    job.d = term.down->sizes[1];
    if (term.up) check_two_dimensional(*term.up);
    job.b = term.up ? term.up->sizes[0] : job.h;
    check_dense_fp32(*term.w1, {"a", job.a}, {"c", job.c});
    check_dense_fp32(*term.down, {"h", job.h}, {"d", job.d});
    if (term.up) check_dense_fp32(*term.up, {"b", job.b}, {"h", job.h});
    if (term.factors) check_vector_fp32(*term.factors, {"a b", job.a * job.b});
    check_two_dimensional(x);
    job.M = x.sizes[0];
    check_matrix(x, {"M", job.M}, {"c d", job.c * job.d});
    job.w1 = floats(term.w1);
    job.down = floats(term.down);
    job.up = floats(term.up);
    job.factors = floats(term.factors);
    job.scaling = static_cast<float>(term.scaling);
    job.x = x.data;
    job.x_dtype = x.dtype;
    job.x_stride = x.strides[0];
    job.threads = threads;
    return job;
}

}  // namespace

void lokr_forward(const Tensor& x, const LokrTerm& term, const Tensor& y, int threads) {
    Kron job = kron(x, term, threads);
    check_result(y, {"M", job.M}, {"a b", job.a * job.b});
    job.y = y.data;
    job.y_dtype = y.dtype;
    job.y_stride = y.strides[0];
    kernels().kron_forward(job);
}

void lokr_backward(const Tensor& g, const Tensor& x, const LokrTerm& term, const Tensor* dx, const Tensor& dw1,
                   const Tensor& d_down, const Tensor* d_up, int threads) {
    Kron job = kron(x, term, threads);
    check_matrix(g, {"M", job.M}, {"a b", job.a * job.b});
    job.g = g.data;
    job.g_dtype = g.dtype;
    job.g_stride = g.strides[0];
    if (dx) {
        check_result(*dx, {"M", job.M}, {"c d", job.c * job.d});
        job.dx = dx->data;
        job.dx_dtype = dx->dtype;
        job.dx_stride = dx->strides[0];
    }
    check_dense_fp32(dw1, {"a", job.a}, {"c", job.c});
    check_dense_fp32(d_down, {"h", job.h}, {"d", job.d});
    if (job.up && !d_up) throw ValueError("d_up is None; wanted a tensor, because up is one");
    if (job.up) check_dense_fp32(*d_up, {"b", job.b}, {"h", job.h});
    job.dw1 = floats(dw1);
    job.d_down = floats(d_down);
    job.d_up = job.up ? floats(*d_up) : nullptr;
    kernels().kron_backward(job);
}

}  // namespace pyadapt::cpu
