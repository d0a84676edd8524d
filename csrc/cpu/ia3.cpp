#include "ia3.hpp"

#include <cmath>

#include "../core/checks.hpp"
#include "../core/error.hpp"
#include "dispatch.hpp"
#include "operands.hpp"

namespace pyadapt::cpu {
namespace {

void check_per_column(const Tensor* vector, std::int64_t N) {
    if (vector) check_vector_fp32(*vector, {"N", N});
}

}  // namespace

void scale_columns(const Tensor& a, const Tensor* scale, const Tensor* shift, const Tensor* b, const Tensor* out,
                   const Tensor* dot, int threads) {
    check_two_dimensional(a);
    const std::int64_t M = a.sizes[0], N = a.sizes[1];
    check_matrix(a, {"M", M}, {"N", N});
    if (!b != !dot) throw ValueError("b and dot belong together: wanted both, or neither");
    for (const Tensor* vector : {scale, shift, dot}) check_per_column(vector, N);
    Columns job;
    job.rows = M;
    job.cols = N;
    job.a = a.data;
    job.a_dtype = a.dtype;
    job.a_stride = a.strides[0];
    job.scale = floats(scale);
    job.shift = floats(shift);
    if (b) {
        check_matrix(*b, {"M", M}, {"N", N});
        job.b = b->data;
        job.b_dtype = b->dtype;
        job.b_stride = b->strides[0];
        job.dot = floats(*dot);
    }
    if (out) {
        check_result(*out, {"M", M}, {"N", N});
        job.out = out->data;
        job.out_dtype = out->dtype;
        job.out_stride = out->strides[0];
    }
    job.threads = threads;
    kernels().columns(job);
}

bool divide_dots(const Tensor& dot, const Tensor& divisor, double least) {
    const std::int64_t N = dot.sizes[0];
    for (const Tensor* vector : {&dot, &divisor}) check_per_column(vector, N);
    float* dots = floats(dot);
    const float* divisors = floats(&divisor);
    bool small = false;
    for (std::int64_t n = 0; n < N; ++n) {
        small |= std::fabs(divisors[n]) < least;
        dots[n] /= divisors[n];
    }
    return small;
}

}  // namespace pyadapt::cpu
