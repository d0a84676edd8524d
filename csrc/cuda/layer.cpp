#include "layer.hpp"

#include <algorithm>
#include <string>

#include "../core/checks.hpp"
#include "../core/error.hpp"
#include "device.hpp"
#include "operands.hpp"

namespace pyadapt::cuda {
namespace {

// --- checks ---

void check_16_bits(const Tensor& tensor) {
    if (tensor.dtype == DType::f16 || tensor.dtype == DType::bf16) return;
    throw TypeError(std::string(tensor.name) + " is " + name_of(tensor.dtype) +
                    "; the CUDA kernels take float16 or bfloat16");
}

void check_activations(const Tensor& tensor, DType dtype, Extent rows, Extent columns) {
    check_shape(tensor, rows, columns);
    check_dtype(tensor, dtype);
    check_rows(tensor);
}

void check_layer_weight(const Weight& weight, DType dtype, std::int64_t N, std::int64_t K) {
    check_weight(weight, N, K);
    check_per_output(weight, N);
    if (weight.values->dtype != DType::i8) check_dtype(*weight.values, dtype);
}

void run_product(const Gemm& product, const Context& context) {
    check(gemm(product, context.launch), "the fused product", context.device);
}

void run_forward(const Gemm& product, bool by_skinny, Scratch scratch, const Context& context) {
    if (!by_skinny || product.M > skinny_rows || product.right_along_columns) return run_product(product, context);
    void* workspace = scratch.take(skinny_workspace(product, context.launch));
    check(skinny(product, workspace, context.launch), "the product of few rows", context.device);
}

LayerSizes sizes_of(std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t rank, DType dtype) {
    return {size_of(M, "M"), size_of(N, "N"), size_of(K, "K"), size_of(rank, "r"), dtype, dtype};
}

// The scratch memory of one pass serves the next one too: a stream runs them one after the other.
void run_gradients(const Tensor& g, const Tensor& x, const Adapter& adapter, const Tensor& S, float* dS,
                   const Tensor& dA, const Tensor& dB, const ScaledG& scaled, const Scratch& scratch,
                   const Context& context) {
    const LayerSizes sizes = sizes_of(x.sizes[0], g.sizes[1], x.sizes[1], S.sizes[1], g.dtype);
    GradientPass to_dS = gradient_pass_of(sizes);
    set_g(to_dS, g, scaled);
    to_dS.B = matrix(*adapter.B);
    to_dS.S = static_cast<const float*>(S.data);
    to_dS.scaling = static_cast<float>(adapter.scaling);
    to_dS.dS = dS;
    to_dS.dB = dB.data;
    to_dS.dB_dtype = dB.dtype;
    to_dS.workspace = Scratch(scratch).take(gradient_pass_workspace(to_dS, context.launch));
    check(gradient_pass(to_dS, context.launch), "the g pass", context.device);

    InputPass to_dA = pass_over_x<InputPass>(sizes);
    set_x(to_dA, x, dS, adapter, dA);
    to_dA.workspace = Scratch(scratch).take(input_pass_workspace(to_dA, context.launch));
    check(input_pass(to_dA, context.launch), "the dA pass", context.device);
}

void check_gradients(const Tensor& g, const Tensor& x, const Adapter& adapter, const Tensor& S, const Tensor& dA,
                     const Tensor& dB) {
    check_two_dimensional(x);
    check_two_dimensional(g);
    check_two_dimensional(*adapter.A);
    check_16_bits(g);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], N = g.sizes[1], r = adapter.A->sizes[0];
    check_activations(x, g.dtype, {"M", M}, {"K", K});
    check_activations(g, g.dtype, {"M", M}, {"N", N});
    check_matrix(*adapter.A, {"r", r}, {"K", K});
    check_matrix(*adapter.B, {"N", N}, {"r", r});
    check_dense_fp32(S, {"M", M}, {"r", r});
    check_dense(dA, {"r", r}, {"K", K});
    check_dense(dB, {"N", N}, {"r", r});
}

}  // namespace

std::size_t forward_workspace(const LayerSizes& sizes, bool by_skinny, const Launch& launch) {
    const std::size_t shrinking = sizes.rank ? shrink_workspace(pass_over_x<Shrink>(sizes), launch) : 0;
    if (!by_skinny || sizes.M > skinny_rows) return aligned(shrinking);
    Gemm product = {};
    product.M = sizes.M;
    product.N = sizes.N;
    product.K = sizes.K;
    product.rank = sizes.rank;
    product.dtype = sizes.dtype;
    product.right_dtype = sizes.weight;
    return aligned(std::max(shrinking, skinny_workspace(product, launch)));
}

std::size_t backward_workspace(const LayerSizes& sizes, const Launch& launch) {
    const std::size_t dS = static_cast<std::size_t>(sizes.M) * sizes.rank * sizeof(float);
    const std::size_t passes = std::max(gradient_pass_workspace(gradient_pass_of(sizes), launch),
                                        input_pass_workspace(pass_over_x<InputPass>(sizes), launch));
    const std::size_t scaled_g = sizes.weight == DType::i8 ? static_cast<std::size_t>(sizes.M) * sizes.N * 2 : 0;
    return aligned(dS) + aligned(scaled_g) + aligned(passes);
}

void linear_forward(const Tensor& x, const Weight& weight, const Tensor& y, bool by_skinny, const Context& context) {
    check_two_dimensional(x);
    check_two_dimensional(*weight.values);
    check_16_bits(x);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], N = weight.values->sizes[0];
    check_activations(x, x.dtype, {"M", M}, {"K", K});
    check_layer_weight(weight, x.dtype, N, K);
    check_activations(y, x.dtype, {"M", M}, {"N", N});
    check_output(y);
    check_same_device({&x, weight.values, weight.scale, weight.bias, &y, context.workspace});
    run_forward(forward_product(x, weight, y), by_skinny, Scratch(context), context);
}

void linear_dx(const Tensor& g, const Weight& weight, const Tensor& dx, const Context& context) {
    check_two_dimensional(g);
    check_two_dimensional(*weight.values);
    check_16_bits(g);
    const std::int64_t M = g.sizes[0], N = g.sizes[1], K = weight.values->sizes[1];
    check_activations(g, g.dtype, {"M", M}, {"N", N});
    check_layer_weight(weight, g.dtype, N, K);
    check_activations(dx, g.dtype, {"M", M}, {"K", K});
    check_output(dx);
    check_same_device({&g, weight.values, weight.scale, &dx, context.workspace});
    Scratch scratch(context);
    void* scaled_g = nullptr;
    if (weight.scale && M * N > 0) {
        scaled_g = scratch.take(static_cast<std::size_t>(M * N) * 2);
        GradientPass scaling = gradient_pass_of(sizes_of(M, N, K, 0, g.dtype));
        set_g(scaling, g, {scaled_g, scale_of(weight), g_factor});
        check(gradient_pass(scaling, context.launch), "scaling g", context.device);
    }
    run_product(dx_product(g, weight, scaled_g, dx), context);
}

void lora_shrink(const Tensor& x, const Adapter& adapter, const Tensor& S, const Context& context) {
    check_two_dimensional(x);
    check_two_dimensional(*adapter.A);
    check_16_bits(x);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], r = adapter.A->sizes[0];
    check_activations(x, x.dtype, {"M", M}, {"K", K});
    check_matrix(*adapter.A, {"r", r}, {"K", K});
    check_dense_fp32(S, {"M", M}, {"r", r});
    check_same_device({&x, adapter.A, &S, context.workspace});
    Shrink pass = pass_over_x<Shrink>(sizes_of(M, 0, K, r, x.dtype));
    set_x(pass, x, adapter, S);
    pass.workspace = Scratch(context).take(shrink_workspace(pass, context.launch));
    check(shrink(pass, context.launch), "the S pass", context.device);
}

void lora_forward(const Tensor& x, const Weight& weight, const Adapter& adapter, const Tensor& y, const Tensor& S,
                  bool by_skinny, const Context& context) {
    check_two_dimensional(x);
    check_two_dimensional(*weight.values);
    check_two_dimensional(S);
    check_16_bits(x);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], N = weight.values->sizes[0], r = S.sizes[1];
    check_layer_weight(weight, x.dtype, N, K);
    check_matrix(*adapter.B, {"N", N}, {"r", r});
    check_activations(y, x.dtype, {"M", M}, {"N", N});
    check_output(y);
    check_same_device({&x, weight.values, weight.scale, weight.bias, adapter.B, &y, &S});
    lora_shrink(x, adapter, S, context);
    Gemm product = forward_product(x, weight, y);
    add_low_rank(product, S, adapter);
    run_forward(product, by_skinny, Scratch(context), context);
}

void lora_expand(const Tensor& S, const Adapter& adapter, const Weight& weight, const Tensor& y,
                 const Context& context) {
    check_two_dimensional(S);
    check_two_dimensional(*adapter.B);
    check_16_bits(y);
    const std::int64_t M = S.sizes[0], r = S.sizes[1], N = adapter.B->sizes[0];
    check_dense_fp32(S, {"M", M}, {"r", r});
    check_matrix(*adapter.B, {"N", N}, {"r", r});
    check_per_output(weight, N);
    check_result(y, {"M", M}, {"N", N});
    check_same_device({&S, adapter.B, weight.scale, weight.bias, &y});
    Gemm product = product_into(y);
    product.add_out = true;
    product.right_dtype = product.dtype;
    add_epilogue(product, weight);
    add_low_rank(product, S, adapter);
    run_product(product, context);
}

void lora_gradients(const Tensor& g, const Tensor& x, const Adapter& adapter, const Tensor& S, const Tensor& dS,
                    const Tensor& dA, const Tensor& dB, const Tensor* weight_scale, double factor,
                    const Tensor* scaled_g, const Context& context) {
    check_gradients(g, x, adapter, S, dA, dB);
    check_dense_fp32(dS, {"M", S.sizes[0]}, {"r", S.sizes[1]});
    if (scaled_g) {
        check_dense(*scaled_g, {"M", g.sizes[0]}, {"N", g.sizes[1]});
        check_dtype(*scaled_g, g.dtype);
        if (!weight_scale) throw ValueError("scaled_g is given without weight_scale; wanted both or neither");
        check_per_output({nullptr, weight_scale, nullptr}, g.sizes[1]);
    }
    check_same_device({&g, &x, adapter.A, adapter.B, &S, &dS, &dA, &dB, weight_scale, scaled_g, context.workspace});
    ScaledG scaled = {};
    if (scaled_g)
        scaled = {scaled_g->data, static_cast<const float*>(weight_scale->data), static_cast<float>(factor)};
    run_gradients(g, x, adapter, S, static_cast<float*>(dS.data), dA, dB, scaled, Scratch(context), context);
}

void lora_expand_dx(const Tensor& dS, const Adapter& adapter, const Tensor& dx, const Context& context) {
    check_two_dimensional(dS);
    check_two_dimensional(*adapter.A);
    check_16_bits(dx);
    const std::int64_t M = dS.sizes[0], r = dS.sizes[1], K = adapter.A->sizes[1];
    check_dense_fp32(dS, {"M", M}, {"r", r});
    check_matrix(*adapter.A, {"r", r}, {"K", K});
    check_result(dx, {"M", M}, {"K", K});
    check_same_device({&dS, adapter.A, &dx});
    Gemm product = product_into(dx);
    product.add_out = true;
    product.right_dtype = product.dtype;
    add_low_rank_dx(product, static_cast<const float*>(dS.data), adapter);
    run_product(product, context);
}

void lora_backward(const Tensor& g, const Tensor& x, const Weight& weight, const Adapter& adapter, const Tensor& S,
                   const Tensor* dx, const Tensor& dA, const Tensor& dB, const Context& context) {
    check_gradients(g, x, adapter, S, dA, dB);
    const std::int64_t M = g.sizes[0], N = g.sizes[1], K = x.sizes[1], r = adapter.A->sizes[0];
    check_layer_weight(weight, g.dtype, N, K);
    if (dx) {
        check_activations(*dx, g.dtype, {"M", M}, {"K", K});
        check_output(*dx);
    }
    check_same_device({&g, &x, weight.values, weight.scale, adapter.A, adapter.B, &S, dx, &dA, &dB, context.workspace});

    Scratch scratch(context);
    float* dS = static_cast<float*>(scratch.take(static_cast<std::size_t>(M * r) * sizeof(float)));
    void* scaled_g = dx && weight.scale ? scratch.take(static_cast<std::size_t>(M * N) * 2) : nullptr;
    run_gradients(g, x, adapter, S, dS, dA, dB, {scaled_g, scale_of(weight), g_factor}, scratch, context);
    if (!dx) return;
    Gemm product = dx_product(g, weight, scaled_g, *dx);
    add_low_rank_dx(product, dS, adapter);
    run_product(product, context);
}

void quantize_rows(const Tensor& w, const Tensor& q, const Tensor& scale, const Context& context) {
    check_quantizing(w, q, scale);
    check_same_device({&w, &q, &scale});
    const Quantize pass = {size_of(w.sizes[0], "N"), size_of(w.sizes[1], "K"), w.data, w.dtype, w.strides[0],
                           static_cast<std::int8_t*>(q.data), q.strides[0], static_cast<float*>(scale.data)};
    check(quantize(pass, context.launch), "quantising", context.device);
}

void dequantize_rows(const Tensor& q, const Tensor* scale, double factor, const Tensor& out, const Context& context) {
    check_dequantizing(q, scale, out);
    check_same_device({&q, scale, &out});
    const Dequantize pass = {size_of(q.sizes[0], "N"), size_of(q.sizes[1], "K"), static_cast<const std::int8_t*>(q.data),
                             q.strides[0], scale ? static_cast<const float*>(scale->data) : nullptr,
                             static_cast<float>(factor), out.data, out.dtype, out.strides[0]};
    check(dequantize(pass, context.launch), "dequantising", context.device);
}

}  // namespace pyadapt::cuda
