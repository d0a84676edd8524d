#include "ia3.hpp"

#include <cmath>

#include "../core/checks.hpp"
#include "../core/error.hpp"
#include "dispatch.hpp"

namespace pyadapt::cpu {
namespace {

const float* floats_of(const Tensor* vector, std::int64_t N) {
    if (!vector) return nullptr;
    check_shape(*vector, {"N", N});
    check_dtype(*vector, DType::f32);
    check_rows(*vector);
    return static_cast<const float*>(vector->data);
}

}  // namespace

void scale_columns(const Tensor& a, const Tensor* scale, const Tensor* shift, const Tensor* b, const Tensor* out,
                   const Tensor* dot, int threads) {
    check_two_dimensional(a);
    const std::int64_t M = a.sizes[0], N = a.sizes[1];
    check_matrix(a, {"M", M}, {"N", N});
    if (!b != !dot) throw ValueError("b and dot belong together: wanted both, or neither");
    Columns job;
    job.rows = M;
    job.cols = N;
    job.a = a.data;
    job.a_dtype = a.dtype;
    job.a_stride = a.strides[0];
    job.scale = floats_of(scale, N);
    job.shift = floats_of(shift, N);
    if (b) {
        check_matrix(*b, {"M", M}, {"N", N});
        job.b = b->data;
        job.b_dtype = b->dtype;
        job.b_stride = b->strides[0];
        job.dot = const_cast<float*>(floats_of(dot, N));
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
    auto* dots = const_cast<float*>(floats_of(&dot, N));
    const float* divisors = floats_of(&divisor, N);
    bool small = false;
    for (std::int64_t n = 0; n < N; ++n) {
        small |= std::fabs(divisors[n]) < least;
        dots[n] /= divisors[n];
    }
    return small;
}

}  // namespace pyadapt::cpu
