// LoRA in which each segment of rows has an adapter of its own: the low-rank passes, beside a frozen product that is
// made elsewhere. Shapes as in pyadapt/ops/lora_rows.py: x (M, K), y and g (M, N), adapter a: A (r, K), B (N, r); S
// (M, R) with R at least the largest rank, of which a row of adapter a holds r columns.
#pragma once

#include <cstdint>
#include <vector>

#include "layer.hpp"

namespace pyadapt::cpu {

// segments (n, 2), int64: the first row of each segment, ascending from 0, and its adapter; -1 is the base layer alone.
// A segment ends where the next one starts.

// S = drop(x) A_a', zero beyond r and in rows of the base layer; y = y + s S B_a', in place
void lora_rows_forward(const Tensor& x, const std::vector<Adapter>& adapters, const Tensor& segments, const Tensor& S,
                       const Tensor& y, int threads);
// dS = s g B_a; dB_a = s g' S and dA_a = dS' drop(x) over the adapter's segments; dx = dx + mask(dS A_a), in place.
// dx may be null.
void lora_rows_backward(const Tensor& g, const Tensor& x, const std::vector<Adapter>& adapters, const Tensor& segments,
                        const Tensor& S, const Tensor* dx, const std::vector<Tensor>& dA, const std::vector<Tensor>& dB,
                        int threads);

}  // namespace pyadapt::cpu
