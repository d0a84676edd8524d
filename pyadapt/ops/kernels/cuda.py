"""The CUDA kernels as functions of tensors: outputs and scratch memory are allocated here, from torch's allocator.

x, g and W have one 16-bit dtype, or W is int8; operands may have any row stride, and what lacks a unit stride is copied
for the call. x and g of a whole layer may have any leading dimensions, which y and dx then have too. Everything is
queued on the current stream; nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyadapt import native

_core: Any = native.cuda


def _stream(tensor: Tensor) -> int:
    """The handle of the stream that torch would use now."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _index(tensor: Tensor) -> int:
    return tensor.device.index or 0


def _scratch(like: Tensor, size: int) -> Tensor | None:
    return torch.empty(size, dtype=torch.int8, device=like.device) if size else None


def _seed(seed: Tensor | None, x: Tensor) -> Tensor | int | None:
    """A seed on x's device is read there, so that a captured graph draws new masks; one on the CPU is a number."""
    return seed if seed is None or seed.device == x.device else int(seed)


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim == 2 else tensor.shape[:-1].numel()


def _dense_like(matrix: Tensor) -> Tensor:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)


def _forward_scratch(x: Tensor, weight: Tensor, rank: int, skinny: bool) -> Tensor | None:
    N, K = weight.shape
    int8 = weight.dtype == torch.int8
    return _scratch(
        x, _core().forward_workspace(_rows(x), N, K, rank, x.dtype == torch.bfloat16, int8, skinny, _index(x))
    )


def _backward_scratch(g: Tensor, N: int, K: int, rank: int, int8: bool) -> Tensor | None:
    return _scratch(g, _core().backward_workspace(_rows(g), N, K, rank, g.dtype == torch.bfloat16, int8, _index(g)))


def linear_forward(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    skinny: bool = False,
) -> Tensor:
    """y = x W' scale + bias."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
    scratch = _forward_scratch(x, weight, 0, skinny)
    _core().linear_forward(x, weight, weight_scale, bias, y, skinny, scratch, _stream(x))
    return y


def linear_dx(g: Tensor, weight: Tensor, weight_scale: Tensor | None, x_dtype: torch.dtype) -> Tensor:
    """dx = g W."""
    dx = g.new_empty((*g.shape[:-1], weight.shape[1]), dtype=x_dtype)
    N, K = weight.shape
    scratch = _backward_scratch(g, N, K, 0, weight_scale is not None)
    _core().linear_dx(g, weight, weight_scale, dx, scratch, _stream(g))
    return dx


def lora_forward(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
    skinny: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, S)."""
    r = A.shape[0]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
    S = x.new_empty((_rows(x), r), dtype=torch.float32)
    scratch = _forward_scratch(x, weight, r, skinny)
    _core().lora_forward(
        x,
        weight,
        weight_scale,
        bias,
        A,
        B,
        y,
        S,
        scaling,
        dropout_p,
        _seed(seed, x),
        skinny,
        scratch,
        _stream(x),
    )
    return y, S


def lora_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB); dx is empty when it is not asked for."""
    dx = _dense_like(x) if need_dx else x.new_empty(0)
    dA, dB = _dense_like(A), _dense_like(B)
    scratch = _backward_scratch(g, B.shape[0], A.shape[1], A.shape[0], need_dx and weight_scale is not None)
    _core().lora_backward(
        g,
        x,
        weight,
        weight_scale,
        A,
        B,
        S,
        dx if need_dx else None,
        dA,
        dB,
        scaling,
        dropout_p,
        _seed(seed, x),
        scratch,
        _stream(g),
    )
    return dx, dA, dB


def shrink(
    x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """S = drop(x) A' in fp32, to fp32's exactness for every ``out_dtype``."""
    r, K = A.shape
    S = x.new_empty((x.shape[0], r), dtype=torch.float32)
    scratch = _scratch(
        x, _core().forward_workspace(x.shape[0], 0, K, r, x.dtype == torch.bfloat16, False, False, _index(x))
    )
    _core().lora_shrink(x, A, S, dropout_p, _seed(seed, x), scratch, _stream(x))
    return S


def expand_(
    y: Tensor, S: Tensor, B: Tensor, weight_scale: Tensor | None, bias: Tensor | None, scaling: float
) -> Tensor:
    """y = y scale + bias + s S B', in place."""
    _core().lora_expand(S, B, weight_scale, bias, y, scaling, _stream(y))
    return y


def gradients(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    weight_scale: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dS, dA, dB, g scale factor) = (s g B, dS' drop(x), s g' S, ...); without a scale the last is g."""
    dS, dA, dB = torch.empty_like(S), _dense_like(A), _dense_like(B)
    scaled_g = None if weight_scale is None else _dense_like(g)
    scratch = _backward_scratch(g, g.shape[1], x.shape[1], A.shape[0], False)
    _core().lora_gradients(
        g,
        x,
        A,
        B,
        S,
        dS,
        dA,
        dB,
        weight_scale,
        factor,
        scaled_g,
        scaling,
        dropout_p,
        _seed(seed, x),
        scratch,
        _stream(g),
    )
    return dS, dA, dB, g if scaled_g is None else scaled_g


def expand_dx_(dx: Tensor, dS: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """dx = dx + mask(dS A), in place."""
    _core().lora_expand_dx(dS, A, dx, dropout_p, _seed(seed, dx), _stream(dx))
    return dx


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale); the scale of a row that holds a NaN or Inf is NaN."""
    q = w.new_empty(w.shape, dtype=torch.int8)
    scale = w.new_empty(w.shape[0], dtype=torch.float32)
    _core().quantize_rows(w, q, scale, _stream(w))
    return q, scale


def dequantize_rows(q: Tensor, scale: Tensor | None, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """q scale factor, rounded once; with no scale the integers times the factor."""
    out = q.new_empty(q.shape, dtype=dtype)
    _core().dequantize_rows(q, scale, factor, out, _stream(q))
    return out
