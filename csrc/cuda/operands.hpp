// Tensors as operands of the kernels, and the scratch memory that a call hands out to them. For layer.cpp alone.
#pragma once

#include <limits>
#include <string>

#include "../core/error.hpp"
#include "layer.hpp"

namespace pyadapt::cuda {

inline int size_of(std::int64_t size, const char* letter) {
    if (size <= std::numeric_limits<int>::max()) return static_cast<int>(size);
    throw ValueError(std::string(letter) + " is " + std::to_string(size) +
                     "; the CUDA kernels take up to 2^31 - 1: split the batch");
}

// --- scratch memory ---

constexpr std::size_t alignment = 256;

inline std::size_t aligned(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

// Hands out parts of the caller's workspace.
class Scratch {
public:
    explicit Scratch(const Context& context) : left_(0), memory_(nullptr) {
        if (!context.workspace) return;
        memory_ = static_cast<char*>(context.workspace->data);
        left_ = static_cast<std::size_t>(context.workspace->sizes[0]);
    }
    void* take(std::size_t bytes) {
        if (bytes == 0) return nullptr;
        if (aligned(bytes) > left_)
            throw ValueError("workspace has too few bytes: " + std::to_string(aligned(bytes) - left_) +
                             " more are needed; ask the *_workspace function of the call");
        void* part = memory_;
        memory_ += aligned(bytes);
        left_ -= aligned(bytes);
        return part;
    }

private:
    std::size_t left_;
    char* memory_;
};

// --- operands ---

inline const float* scale_of(const Weight& weight) {
    return weight.scale ? static_cast<const float*>(weight.scale->data) : nullptr;
}

inline Matrix matrix(const Tensor& t) { return {t.data, t.dtype, t.strides[0], t.strides[1]}; }
inline Matrix transposed(const Tensor& t) { return {t.data, t.dtype, t.strides[1], t.strides[0]}; }

constexpr DeviceDropout no_dropout = {nullptr, {0, 0}, 0, 1.0f};

inline Gemm product_into(const Tensor& out) {
    Gemm product = {};
    product.M = size_of(out.sizes[0], "M");
    product.N = size_of(out.sizes[1], "N");
    product.dtype = out.dtype;
    product.alpha = 1.0f;
    product.dropout = no_dropout;
    product.out = out.data;
    product.out_stride = out.strides[0];
    return product;
}

// right (columns of out, depth) as it lies: W (N, K) in a forward, its transpose in dx.
inline void set_right(Gemm& product, const Tensor& right, int column_dimension) {
    const int depth_dimension = 1 - column_dimension;
    product.right = right.data;
    product.right_dtype = right.dtype;
    // Unit stride along both means a single row or column, which the depth takes.
    product.right_along_columns = right.strides[depth_dimension] != 1;
    product.right_stride = right.strides[product.right_along_columns ? depth_dimension : column_dimension];
}

inline void set_left(Gemm& product, const void* data, std::int64_t stride, std::int64_t depth) {
    product.left = data;
    product.left_stride = stride;
    product.K = size_of(depth, "the depth of a product");
}

inline void add_epilogue(Gemm& product, const Weight& weight) {
    product.column_scale = scale_of(weight);
    if (!weight.bias) return;
    product.bias = weight.bias->data;
    product.bias_dtype = weight.bias->dtype;
}

inline void add_low_rank(Gemm& product, const Tensor& S, const Adapter& adapter) {
    product.rank = size_of(S.sizes[1], "r");
    product.low_left = static_cast<const float*>(S.data);
    product.low_right = matrix(*adapter.B);
    product.low_scale = static_cast<float>(adapter.scaling);
}

inline void add_low_rank_dx(Gemm& product, const float* dS, const Adapter& adapter) {
    product.rank = size_of(adapter.A->sizes[0], "r");
    product.low_left = dS;
    product.low_right = transposed(*adapter.A);
    product.low_scale = 1.0f;
    product.dropout = adapter.dropout;
}

inline Gemm forward_product(const Tensor& x, const Weight& weight, const Tensor& y) {
    Gemm product = product_into(y);
    set_left(product, x.data, x.strides[0], x.sizes[1]);
    set_right(product, *weight.values, 0);
    add_epilogue(product, weight);
    return product;
}

// `scaled_g`: what stands for g over an int8 W.
inline Gemm dx_product(const Tensor& g, const Weight& weight, const void* scaled_g, const Tensor& dx) {
    Gemm product = product_into(dx);
    set_left(product, scaled_g ? scaled_g : g.data, scaled_g ? g.sizes[1] : g.strides[0], g.sizes[1]);
    set_right(product, *weight.values, 1);
    if (scaled_g) product.alpha = 1.0f / g_factor;
    return product;
}

// --- the low-rank passes: sizes, which their scratch memory depends on, and then operands ---

// Shrink or InputPass.
template <class Pass>
Pass pass_over_x(const LayerSizes& sizes) {
    Pass pass = {};
    pass.M = sizes.M;
    pass.K = sizes.K;
    pass.rank = sizes.rank;
    pass.dtype = sizes.dtype;
    return pass;
}

inline GradientPass gradient_pass_of(const LayerSizes& sizes) {
    GradientPass pass = {};
    pass.M = sizes.M;
    pass.N = sizes.N;
    pass.rank = sizes.rank;
    pass.dtype = sizes.dtype;
    return pass;
}

inline void set_x(Shrink& pass, const Tensor& x, const Adapter& adapter, const Tensor& S) {
    pass.x = x.data;
    pass.x_stride = x.strides[0];
    pass.small = matrix(*adapter.A);
    pass.dropout = adapter.dropout;
    pass.alpha = 1.0f;
    pass.out = static_cast<float*>(S.data);
}

// What is to be written beside dS and dB: g scale factor, or nothing.
struct ScaledG {
    void* data;
    const float* scale;
    float factor;
};

inline void set_g(GradientPass& pass, const Tensor& g, const ScaledG& scaled) {
    pass.g = g.data;
    pass.g_stride = g.strides[0];
    if (!scaled.data) return;
    pass.g_scale = scaled.scale;
    pass.g_factor = scaled.factor;
    pass.scaled_g = scaled.data;
}

inline void set_x(InputPass& pass, const Tensor& x, const float* dS, const Adapter& adapter, const Tensor& dA) {
    pass.x = x.data;
    pass.x_stride = x.strides[0];
    pass.dS = dS;
    pass.dropout = adapter.dropout;
    pass.dA = dA.data;
    pass.dA_dtype = dA.dtype;
}

}  // namespace pyadapt::cuda
