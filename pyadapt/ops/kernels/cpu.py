"""The CPU kernels as functions of tensors: outputs are allocated here, everything is checked over there.

Operands may have any row stride; what lacks a unit stride (an expanded gradient, say) is copied for the call. x and g
of a whole layer may have any leading dimensions, which y and dx then have too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, get_num_threads

from pyadapt import native

_core: Any = native.core
_CPU = torch.device("cpu")


def _new(rows: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """An output of as many rows."""
    if rows.ndim == 2:
        return torch.empty(rows.shape[0], columns, dtype=dtype, device=_CPU)
    return torch.empty(*rows.shape[:-1], columns, dtype=dtype, device=_CPU)


def _new_like(tensor: Tensor) -> Tensor:
    """An output of the same shape and dtype, without gaps."""
    return torch.empty_like(tensor) if tensor.is_contiguous() else tensor.new_empty(tensor.shape)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    skinny: bool = False,
) -> Tensor:
    """y = x W' scale + bias."""
    y = _new(x, weight.shape[0], out_dtype)
    _core().linear_forward(
        x,
        weight,
        weight_scale,
        bias,
        y,
        skinny,
        get_num_threads(),
    )
    return y


def linear_dx(g: Tensor, weight: Tensor, weight_scale: Tensor | None, x_dtype: torch.dtype) -> Tensor:
    """dx = g W."""
    dx = _new(g, weight.shape[1], x_dtype)
    _core().linear_dx(g, weight, weight_scale, dx, get_num_threads())
    return dx


def scaled_linear_forward(
    x: Tensor,
    input_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    skinny: bool = False,
) -> Tensor:
    """y = (x input_scale) W' scale + bias."""
    y = _new(x, weight.shape[0], out_dtype)
    _core().scaled_linear_forward(x, input_scale, weight, weight_scale, bias, y, skinny, get_num_threads())
    return y


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
    y = _new(x, weight.shape[0], out_dtype)
    M = x.shape[0] if x.ndim == 2 else x.shape[:-1].numel()
    S = torch.empty(M, A.shape[0], dtype=torch.float32, device=_CPU)
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
        seed,
        skinny,
        get_num_threads(),
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
    dx = _new_like(x) if need_dx else x.new_empty(0)
    dA, dB = _new_like(A), _new_like(B)
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
        seed,
        get_num_threads(),
    )
    return dx, dA, dB


def shrink(
    x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """S = drop(x) A' in fp32, as exact as an output in ``out_dtype`` asks for: for bf16 A may be rounded to it."""
    S = _new(x, A.shape[0], torch.float32)
    _core().lora_shrink(x, A, S, dropout_p, seed, out_dtype == torch.bfloat16, get_num_threads())
    return S


def expand_(
    y: Tensor, S: Tensor, B: Tensor, weight_scale: Tensor | None, bias: Tensor | None, scaling: float
) -> Tensor:
    """y = y scale + bias + s S B', in place."""
    _core().lora_expand(
        S,
        B,
        weight_scale,
        bias,
        y,
        scaling,
        get_num_threads(),
    )
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
    dS = _new_like(S)
    dA, dB = _new_like(A), _new_like(B)
    _core().lora_gradients(
        g,
        x,
        A,
        B,
        S,
        dS,
        dA,
        dB,
        scaling,
        dropout_p,
        seed,
        get_num_threads(),
    )
    scaled_g = g if weight_scale is None else (g * (weight_scale * factor)).to(g.dtype)
    return dS, dA, dB, scaled_g


def input_gradient(dS: Tensor, x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """dA = dS' drop(x), shaped and stored as A."""
    dA = _new_like(A)
    _core().lora_input_gradient(dS, x, dA, dropout_p, seed, get_num_threads())
    return dA


def expand_dx_(dx: Tensor, dS: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """dx = dx + mask(dS A), in place."""
    _core().lora_expand_dx(dS, A, dx, dropout_p, seed, get_num_threads())
    return dx


def khatri_rao(
    w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, factors: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(A, B) in ``dtype`` with A[(i, j)] = w1b[i] w2b[j], B[n, (i, j)] = s f[n] w1a[n, i] w2a[n, j]; all fp32."""
    (r1, K), r2, N = w1b.shape, w2b.shape[0], w1a.shape[0]
    A, B = w1b.new_empty((r1 * r2, K), dtype=dtype), w1a.new_empty((N, r1 * r2), dtype=dtype)
    four = (w.contiguous() for w in (w1a, w1b, w2a, w2b))
    _core().khatri_rao(*four, factors, A, B, scaling, get_num_threads())
    return A, B


def khatri_rao_backward(
    dA: Tensor,
    dB: Tensor,
    w1a: Tensor,
    w1b: Tensor,
    w2a: Tensor,
    w2b: Tensor,
    factors: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dw1a, dw1b, dw2a, dw2b) in fp32."""
    four = [w.contiguous() for w in (w1a, w1b, w2a, w2b)]
    gradients = [torch.empty_like(w) for w in four]
    _core().khatri_rao_backward(
        dA.contiguous(), dB.contiguous(), *four, factors, *gradients, scaling, get_num_threads()
    )
    return gradients[0], gradients[1], gradients[2], gradients[3]


def lokr_forward_(
    y: Tensor, x: Tensor, w1: Tensor, down: Tensor, up: Tensor | None, factors: Tensor | None, scaling: float
) -> Tensor:
    """y = y + (s factors) * (x kron(w1, up down)'), in place; the matrices are fp32."""
    _core().lokr_forward(x, w1, down, up, factors, y, scaling, get_num_threads())
    return y


def lokr_backward_(
    dx: Tensor | None,
    g: Tensor,
    x: Tensor,
    w1: Tensor,
    down: Tensor,
    up: Tensor | None,
    factors: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dw1, d_down, d_up), and the term's part added to dx, in place; the matrices are fp32."""
    dw1, d_down, d_up = torch.empty_like(w1), torch.empty_like(down), None if up is None else torch.empty_like(up)
    _core().lokr_backward(g, x, w1, down, up, factors, dx, dw1, d_down, d_up, scaling, get_num_threads())
    return dw1, d_down, d_up


def scale_columns(a: Tensor, scale: Tensor, shift: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a scale + shift for a (M, N), scale and shift (N,) fp32, rounded once; ``out`` may be a."""
    out = _new_like(a) if out is None else out
    _core().scale_columns(a, scale, shift, None, out, None, get_num_threads())
    return out


def scale_columns_dot(a: Tensor, b: Tensor, scale: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The sum over m of a[m, n] b[m, n], (N,) fp32; in the same pass a scale is written to ``out``, which may be a.

    a, b and ``out`` may have any leading dimensions.
    """
    dot = torch.empty(a.shape[-1], dtype=torch.float32, device=_CPU)
    _core().scale_columns(a, scale, None, b, out, dot, get_num_threads())
    return dot


def column_quotients(a: Tensor, b: Tensor, divisor: Tensor, least: float) -> tuple[Tensor, bool]:
    """(``scale_columns_dot(a, b)`` / divisor, whether some |divisor| is below ``least``), divisor (N,) fp32."""
    dot = torch.empty(a.shape[-1], dtype=torch.float32, device=_CPU)
    return dot, _core().column_quotients(a, b, divisor, least, dot, get_num_threads())


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale); the scale of a row that holds a NaN or Inf is NaN."""
    q = w.new_empty(w.shape, dtype=torch.int8)
    scale = w.new_empty(w.shape[0], dtype=torch.float32)
    _core().quantize_rows(w, q, scale, get_num_threads())
    return q, scale


def dequantize_rows(q: Tensor, scale: Tensor | None, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """q scale factor, rounded once; with no scale the integers times the factor, a power of two."""
    if factor != 1.0:
        scale = q.new_full(q.shape[:1], factor, dtype=torch.float32) if scale is None else scale * factor
    out = q.new_empty(q.shape, dtype=dtype)
    _core().dequantize_rows(q, scale, out, get_num_threads())
    return out
