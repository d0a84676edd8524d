"""Symmetric int8 weights with one scale an output row: W[n, k] = q[n, k] * scale[n].

    scale[n] = max_k |W[n, k]| / 127,   q = round to nearest even(W / scale), in [-127, 127]

A row of zeros has scale 0 and q 0. A NaN or Inf has no meaning here and is refused by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels, registry, routes

LEVELS = 127.0


def quantize_rows_reference(w: Tensor) -> tuple[Tensor, Tensor]:
    """q (N, K) int8 and scale (N,) fp32 in plain torch."""
    w = w.to(torch.float32)
    if w.shape[1] == 0:
        return w.to(torch.int8), w.new_zeros(w.shape[0])
    peak = w.abs().amax(dim=1)
    _refuse_rows(~torch.isfinite(peak))
    scale = peak / LEVELS
    q = (w / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-LEVELS, LEVELS)
    return q.to(torch.int8), scale


def dequantize_rows_reference(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q * scale by rows, rounded once to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return (q.to(wide) * scale.to(wide)[:, None]).to(dtype)


def _refuse_rows(bad: Tensor) -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"cannot quantise the weight: row {row} holds a NaN or Inf ({int(bad.sum())} such rows in all)"
        )


def _quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    if not routes.native_serves(w, w.dtype):
        return quantize_rows_reference(w)
    q, scale = kernels.of(w).quantize_rows(w)
    _refuse_rows(scale.isnan())
    return q, scale


def _dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    serves = routes.native_serves(q, dtype) and q.stride(-1) == 1
    return (kernels.of(q).dequantize_rows if serves else dequantize_rows_reference)(q, scale, dtype)


registry.define(
    "quantize_rows(Tensor w) -> (Tensor q, Tensor scale)",
    _quantize_rows,
    fake=lambda w: (w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[0], dtype=torch.float32)),
)
registry.define(
    "dequantize_rows(Tensor q, Tensor scale, ScalarType dtype) -> Tensor",
    _dequantize_rows,
    fake=lambda q, scale, dtype: q.new_empty(q.shape, dtype=dtype),
)
