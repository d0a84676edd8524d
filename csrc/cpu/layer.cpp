#include "layer.hpp"

#include <string>
#include <vector>

#include "../core/checks.hpp"
#include "../core/error.hpp"
#include "dispatch.hpp"
#include "operands.hpp"

namespace pyadapt::cpu {
namespace {

const float* scale_of(const Weight& weight) { return floats(weight.scale); }

Gemm product_into(const Tensor& out, const Operand& left, const Operand& right, std::int64_t depth, int threads) {
    Gemm product;
    product.rows = out.sizes[0];
    product.cols = out.sizes[1];
    product.depth = depth;
    product.left = left;
    product.right = right;
    product.out = out.data;
    product.out_dtype = out.dtype;
    product.out_stride = out.strides[0];
    product.threads = threads;
    return product;
}

void add_epilogue(Gemm& product, const Weight& weight) {
    product.col_scale = scale_of(weight);
    if (!weight.bias) return;
    product.bias = weight.bias->data;
    product.bias_dtype = weight.bias->dtype;
}

void add_low_rank(Gemm& product, const Tensor& S, const Adapter& adapter) {
    product.rank = S.sizes[1];
    product.low_left = rows_of(S);
    product.low_right = times(adapter.scaling, rows_of(*adapter.B));
}

void add_low_rank_dx(Gemm& product, const Tensor& dS, const Adapter& adapter) {
    product.rank = dS.sizes[1];
    product.low_left = rows_of(dS);
    product.low_right = columns_of(*adapter.A);
    product.low_dropout = &adapter.dropout;
}

Gemm forward_product(const Tensor& x, const Weight& weight, const Tensor& y, int threads) {
    Gemm product = product_into(y, rows_of(x), rows_of(*weight.values), x.sizes[1], threads);
    add_epilogue(product, weight);
    return product;
}

// The row scale of an int8 weight lies on the axis that dx sums over: it goes into g as g is packed.
Gemm dx_product(const Tensor& g, const Weight& weight, const Tensor& dx, int threads) {
    Gemm product = product_into(dx, rows_of(g), columns_of(*weight.values), g.sizes[1], threads);
    product.left.depth_scale = scale_of(weight);
    return product;
}

Skinny skinny_layer(const Tensor& x, const Weight& weight, const Tensor& y, int threads) {
    Skinny layer;
    layer.rows = y.sizes[0];
    layer.cols = y.sizes[1];
    layer.depth = x.sizes[1];
    layer.x = rows_of(x);
    layer.weight = rows_of(*weight.values);
    layer.col_scale = scale_of(weight);
    if (weight.bias) {
        layer.bias = weight.bias->data;
        layer.bias_dtype = weight.bias->dtype;
    }
    layer.out = y.data;
    layer.out_dtype = y.dtype;
    layer.out_stride = y.strides[0];
    layer.threads = threads;
    return layer;
}

void run(const Gemm& product) { kernels().gemm(&product, 1); }

void run(const Gemm& first, const Gemm& second) {
    static_assert(most_products >= 2);
    const Gemm products[] = {first, second};
    kernels().gemm(products, 2);
}

// dS = s g B and dB = s g' S read the same g and do not depend on each other.
void run_g_passes(const Tensor& g, const Adapter& adapter, const Tensor& S, const Tensor& dS, const Tensor& dB,
                  int threads) {
    Gemm to_dS = product_into(dS, rows_of(g), columns_of(*adapter.B), g.sizes[1], threads);
    Gemm to_dB = product_into(dB, columns_of(g), columns_of(S), g.sizes[0], threads);
    to_dS.alpha = to_dB.alpha = static_cast<float>(adapter.scaling);
    to_dS.rounds = to_dB.rounds = g.dtype == DType::bf16;
    run(to_dS, to_dB);
}

// The mask without its scale, which multiplies the product: what is kept of a bf16 x is still bf16.
Dropout mask_of(const Adapter& adapter) {
    Dropout mask = adapter.dropout;
    mask.scale = 1.0f;
    return mask;
}
float mask_scale(const Adapter& adapter) { return adapter.dropout.threshold ? adapter.dropout.scale : 1.0f; }

// dS may be rounded where it came from a g of as few bits as x.
Gemm dA_product(const Tensor& dS, const Tensor& x, DType g, const Adapter& adapter, const Dropout& mask,
                const Tensor& dA, int threads) {
    Gemm product = product_into(dA, columns_of(dS), dropped(columns_of(x), mask), x.sizes[0], threads);
    product.alpha = mask_scale(adapter);
    product.rounds = x.dtype == DType::bf16 && g == DType::bf16;
    return product;
}

// --- checks ---

void check_gradients(const Tensor& g, const Tensor& x, const Adapter& adapter, const Tensor& S, const Tensor& dS,
                     const Tensor& dA, const Tensor& dB) {
    check_two_dimensional(x);
    check_two_dimensional(g);
    check_two_dimensional(*adapter.A);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], N = g.sizes[1], r = adapter.A->sizes[0];
    check_matrix(g, {"M", M}, {"N", N});
    check_matrix(x, {"M", M}, {"K", K});
    check_matrix(*adapter.A, {"r", r}, {"K", K});
    check_matrix(*adapter.B, {"N", N}, {"r", r});
    check_matrix(S, {"M", M}, {"r", r});
    check_result(dS, {"M", M}, {"r", r});
    check_result(dA, {"r", r}, {"K", K});
    check_result(dB, {"N", N}, {"r", r});
}

}  // namespace

void linear_forward(const Tensor& x, const Weight& weight, const Tensor& y, bool skinny, int threads,
                    const Tensor* input_scale) {
    check_two_dimensional(x);
    check_two_dimensional(*weight.values);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], N = weight.values->sizes[0];
    check_matrix(x, {"M", M}, {"K", K});
    check_weight(weight, N, K, true);
    check_per_output(weight, N);
    check_result(y, {"M", M}, {"N", N});
    if (input_scale) check_vector_fp32(*input_scale, {"K", K});
    if (skinny && weight.values->strides[1] == 1) {
        Skinny layer = skinny_layer(x, weight, y, threads);
        layer.x.depth_scale = floats(input_scale);
        return kernels().skinny(layer);
    }
    Gemm product = forward_product(x, weight, y, threads);
    product.left.depth_scale = floats(input_scale);
    run(product);
}

void linear_dx(const Tensor& g, const Weight& weight, const Tensor& dx, int threads) {
    check_two_dimensional(g);
    check_two_dimensional(*weight.values);
    const std::int64_t M = g.sizes[0], N = g.sizes[1], K = weight.values->sizes[1];
    check_matrix(g, {"M", M}, {"N", N});
    check_weight(weight, N, K, true);
    check_per_output(weight, N);
    check_result(dx, {"M", M}, {"K", K});
    run(dx_product(g, weight, dx, threads));
}

void lora_shrink(const Tensor& x, const Adapter& adapter, const Tensor& S, DType out, int threads) {
    check_two_dimensional(x);
    check_two_dimensional(*adapter.A);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], r = adapter.A->sizes[0];
    check_matrix(x, {"M", M}, {"K", K});
    check_matrix(*adapter.A, {"r", r}, {"K", K});
    check_result(S, {"M", M}, {"r", r});
    check_dtype(S, DType::f32);
    const Dropout mask = mask_of(adapter);
    Gemm product = product_into(S, dropped(rows_of(x), mask), rows_of(*adapter.A), K, threads);
    product.alpha = mask_scale(adapter);
    product.rounds = x.dtype == DType::bf16 && out == DType::bf16;
    run(product);
}

void lora_forward(const Tensor& x, const Weight& weight, const Adapter& adapter, const Tensor& y, const Tensor& S,
                  bool skinny, int threads) {
    check_two_dimensional(x);
    check_two_dimensional(*weight.values);
    check_two_dimensional(S);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], N = weight.values->sizes[0], r = S.sizes[1];
    check_weight(weight, N, K);
    check_per_output(weight, N);
    check_matrix(*adapter.B, {"N", N}, {"r", r});
    check_result(y, {"M", M}, {"N", N});
    lora_shrink(x, adapter, S, y.dtype, threads);
    if (skinny && weight.values->strides[1] == 1 && (S.strides[0] == r || M <= 1)) {
        Skinny layer = skinny_layer(x, weight, y, threads);
        layer.rank = r;
        layer.S = static_cast<const float*>(S.data);
        layer.B = rows_of(*adapter.B);
        layer.scaling = static_cast<float>(adapter.scaling);
        return kernels().skinny(layer);
    }
    Gemm product = forward_product(x, weight, y, threads);
    add_low_rank(product, S, adapter);
    run(product);
}

void lora_expand(const Tensor& S, const Adapter& adapter, const Weight& weight, const Tensor& y, int threads) {
    check_two_dimensional(S);
    check_two_dimensional(*adapter.B);
    const std::int64_t M = S.sizes[0], r = S.sizes[1], N = adapter.B->sizes[0];
    check_matrix(S, {"M", M}, {"r", r});
    check_matrix(*adapter.B, {"N", N}, {"r", r});
    check_per_output(weight, N);
    check_result(y, {"M", M}, {"N", N});
    Gemm product = product_into(y, Operand{}, Operand{}, 0, threads);
    product.add_out = true;
    add_epilogue(product, weight);
    add_low_rank(product, S, adapter);
    run(product);
}

void lora_gradients(const Tensor& g, const Tensor& x, const Adapter& adapter, const Tensor& S, const Tensor& dS,
                    const Tensor& dA, const Tensor& dB, int threads) {
    check_gradients(g, x, adapter, S, dS, dA, dB);
    run_g_passes(g, adapter, S, dS, dB, threads);
    run(dA_product(dS, x, g.dtype, adapter, mask_of(adapter), dA, threads));
}

void lora_input_gradient(const Tensor& dS, const Tensor& x, const Adapter& adapter, const Tensor& dA, int threads) {
    check_two_dimensional(x);
    check_two_dimensional(dS);
    const std::int64_t M = x.sizes[0], K = x.sizes[1], r = dS.sizes[1];
    check_matrix(x, {"M", M}, {"K", K});
    check_matrix(dS, {"M", M}, {"r", r});
    check_result(dA, {"r", r}, {"K", K});
    run(dA_product(dS, x, dS.dtype, adapter, mask_of(adapter), dA, threads));
}

void lora_expand_dx(const Tensor& dS, const Adapter& adapter, const Tensor& dx, int threads) {
    check_two_dimensional(dS);
    check_two_dimensional(*adapter.A);
    const std::int64_t M = dS.sizes[0], r = dS.sizes[1], K = adapter.A->sizes[1];
    check_matrix(dS, {"M", M}, {"r", r});
    check_matrix(*adapter.A, {"r", r}, {"K", K});
    check_result(dx, {"M", M}, {"K", K});
    Gemm product = product_into(dx, Operand{}, Operand{}, 0, threads);
    product.add_out = true;
    add_low_rank_dx(product, dS, adapter);
    run(product);
}

void lora_backward(const Tensor& g, const Tensor& x, const Weight& weight, const Adapter& adapter, const Tensor& S,
                   const Tensor* dx, const Tensor& dA, const Tensor& dB, int threads) {
    check_two_dimensional(g);
    check_two_dimensional(x);
    const std::int64_t M = g.sizes[0], N = g.sizes[1], K = x.sizes[1], r = adapter.A->sizes[0];
    check_weight(weight, N, K);
    check_per_output(weight, N);
    if (dx) check_result(*dx, {"M", M}, {"K", K});

    std::vector<float> memory(static_cast<std::size_t>(M * r));
    const Tensor dS = {"dS", memory.data(), DType::f32, 2, {M, r}, {r, 1}};
    check_gradients(g, x, adapter, S, dS, dA, dB);
    run_g_passes(g, adapter, S, dS, dB, threads);
    const Dropout mask = mask_of(adapter);
    const Gemm to_dA = dA_product(dS, x, g.dtype, adapter, mask, dA, threads);
    if (!dx) return run(to_dA);
    Gemm to_dx = dx_product(g, weight, *dx, threads);
    add_low_rank_dx(to_dx, dS, adapter);
    run(to_dx, to_dA);
}

}  // namespace pyadapt::cpu
