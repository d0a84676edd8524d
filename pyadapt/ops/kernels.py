"""The native CPU kernels as functions of tensors: outputs are allocated here, everything is checked over there.

Operands may have any row stride. What lacks a unit stride (an expanded gradient, say) is copied for the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from pyadapt import native


def _capsule(tensor: Tensor) -> Any:
    return to_dlpack(tensor if tensor.stride(-1) == 1 else tensor.contiguous())


def _weight(weight: Tensor) -> Any:
    """W as it lies: (N, K) with unit stride along either dimension."""
    return to_dlpack(weight if 1 in weight.stride() else weight.contiguous())


def _optional(tensor: Tensor | None) -> Any:
    return None if tensor is None else _capsule(tensor)


def _core() -> Any:
    return native.core()


def linear_forward(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    skinny: bool = False,
) -> Tensor:
    """y = x W' scale + bias."""
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
    _core().linear_forward(
        _capsule(x),
        _weight(weight),
        _optional(weight_scale),
        _optional(bias),
        to_dlpack(y),
        skinny,
        torch.get_num_threads(),
    )
    return y


def linear_dx(g: Tensor, weight: Tensor, weight_scale: Tensor | None, x_dtype: torch.dtype) -> Tensor:
    """dx = g W."""
    dx = g.new_empty((g.shape[0], weight.shape[1]), dtype=x_dtype)
    _core().linear_dx(_capsule(g), _weight(weight), _optional(weight_scale), to_dlpack(dx), torch.get_num_threads())
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
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
    S = x.new_empty((x.shape[0], A.shape[0]), dtype=torch.float32)
    _core().lora_forward(
        _capsule(x),
        _weight(weight),
        _optional(weight_scale),
        _optional(bias),
        _capsule(A),
        _capsule(B),
        to_dlpack(y),
        to_dlpack(S),
        scaling,
        dropout_p,
        _optional(seed),
        skinny,
        torch.get_num_threads(),
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
    dx = x.new_empty(x.shape if need_dx else (0,))
    dA, dB = A.new_empty(A.shape), B.new_empty(B.shape)
    _core().lora_backward(
        _capsule(g),
        _capsule(x),
        _weight(weight),
        _optional(weight_scale),
        _capsule(A),
        _capsule(B),
        _capsule(S),
        to_dlpack(dx) if need_dx else None,
        to_dlpack(dA),
        to_dlpack(dB),
        scaling,
        dropout_p,
        _optional(seed),
        torch.get_num_threads(),
    )
    return dx, dA, dB


def shrink(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """S = drop(x) A'."""
    S = x.new_empty((x.shape[0], A.shape[0]), dtype=torch.float32)
    _core().lora_shrink(_capsule(x), _capsule(A), to_dlpack(S), dropout_p, _optional(seed), torch.get_num_threads())
    return S


def expand_(
    y: Tensor, S: Tensor, B: Tensor, weight_scale: Tensor | None, bias: Tensor | None, scaling: float
) -> Tensor:
    """y = y scale + bias + s S B', in place."""
    _core().lora_expand(
        _capsule(S),
        _capsule(B),
        _optional(weight_scale),
        _optional(bias),
        to_dlpack(y),
        scaling,
        torch.get_num_threads(),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dS, dA, dB) = (s g B, dS' drop(x), s g' S)."""
    dS = S.new_empty(S.shape)
    dA, dB = A.new_empty(A.shape), B.new_empty(B.shape)
    _core().lora_gradients(
        _capsule(g),
        _capsule(x),
        _capsule(A),
        _capsule(B),
        _capsule(S),
        to_dlpack(dS),
        to_dlpack(dA),
        to_dlpack(dB),
        scaling,
        dropout_p,
        _optional(seed),
        torch.get_num_threads(),
    )
    return dS, dA, dB


def expand_dx_(dx: Tensor, dS: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """dx = dx + mask(dS A), in place."""
    _core().lora_expand_dx(
        _capsule(dS), _capsule(A), to_dlpack(dx), dropout_p, _optional(seed), torch.get_num_threads()
    )
    return dx


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale); the scale of a row that holds a NaN or Inf is NaN."""
    q = w.new_empty(w.shape, dtype=torch.int8)
    scale = w.new_empty(w.shape[0], dtype=torch.float32)
    _core().quantize_rows(_capsule(w), to_dlpack(q), to_dlpack(scale), torch.get_num_threads())
    return q, scale


def dequantize_rows(q: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """q scale; with no scale the integers themselves."""
    out = q.new_empty(q.shape, dtype=dtype)
    _core().dequantize_rows(_capsule(q), _optional(scale), to_dlpack(out), torch.get_num_threads())
    return out
