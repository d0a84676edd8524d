"""The ``library`` route: torch's own GEMM for the frozen products, the low-rank passes before and after it.

An int8 W is widened a panel at a time into a buffer of about two megabytes, cut so that each panel gives finished
columns of the product: nothing is summed in 16 bits, and no 16-bit copy of W ever exists. The integers are exact in
bf16; the row scale multiplies y after the product, and g before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .philox import dropout
from .routes import native_serves

_PANEL_ELEMENTS = 1 << 20


def _widen(q: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 to ``dtype``, laid out as q is."""
    if not native_serves(q, dtype):
        return q.to(dtype)
    if q.stride(1) != 1:
        return kernels.dequantize_rows(q.t(), None, dtype).t()
    return kernels.dequantize_rows(q, None, dtype)


def _panel_width(length: int) -> int:
    return max(64, _PANEL_ELEMENTS // max(length, 1) // 64 * 64)


def times_weight_t(x: Tensor, weight: Tensor) -> Tensor:
    """x W' in x's dtype, without the scale of an int8 W."""
    if weight.dtype != torch.int8:
        return torch.mm(x, weight.t())
    N, K = weight.shape
    y = x.new_empty((x.shape[0], N))
    for n in range(0, N, width := _panel_width(K)):
        torch.mm(x, _widen(weight[n : n + width], x.dtype).t(), out=y[:, n : n + width])
    return y


def times_weight(g: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """g W in g's dtype; the scale of an int8 W goes into g, for it lies on the axis that is summed."""
    if weight_scale is None:
        return torch.mm(g, weight)
    scaled = (g * weight_scale).to(g.dtype)
    N, K = weight.shape
    dx = g.new_empty((g.shape[0], K))
    for k in range(0, K, width := _panel_width(N)):
        torch.mm(scaled, _widen(weight[:, k : k + width], g.dtype), out=dx[:, k : k + width])
    return dx


def linear_forward(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """y = x W' scale + bias."""
    with torch.autocast(x.device.type, enabled=False):
        y = times_weight_t(x, weight)
        if weight_scale is not None:
            y = y * weight_scale
        if bias is not None:
            y = y + bias
        return y.to(out_dtype)


def linear_dx(g: Tensor, weight: Tensor, weight_scale: Tensor | None, x_dtype: torch.dtype) -> Tensor:
    """dx = g W."""
    with torch.autocast(g.device.type, enabled=False):
        return times_weight(g, weight, weight_scale).to(x_dtype)


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
) -> tuple[Tensor, Tensor]:
    """(y, S)."""
    if native_serves(x, x.dtype):
        S = kernels.shrink(x, A, dropout_p, seed)
        with torch.autocast("cpu", enabled=False):
            y = times_weight_t(x, weight).to(out_dtype)
        return kernels.expand_(y, S, B, weight_scale, bias, scaling), S
    with torch.autocast(x.device.type, enabled=False):
        S = dropout(x.float(), seed, dropout_p) @ A.float().t()
        y = linear_forward(x, weight, weight_scale, bias, torch.float32)
        return (y + scaling * (S @ B.float().t())).to(out_dtype), S


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
    dx = x.new_empty(0)
    if native_serves(x, x.dtype):
        dS, dA, dB = kernels.gradients(g, x, A, B, S, scaling, dropout_p, seed)
        if need_dx:
            dx = kernels.expand_dx_(linear_dx(g, weight, weight_scale, x.dtype), dS, A, dropout_p, seed)
        return dx, dA, dB
    with torch.autocast(x.device.type, enabled=False):
        wide = g.float()
        dS = scaling * (wide @ B.float())
        dA = dS.t() @ dropout(x.float(), seed, dropout_p)
        dB = scaling * (wide.t() @ S)
        if need_dx:
            dx = linear_dx(g, weight, weight_scale, torch.float32) + dropout(dS @ A.float(), seed, dropout_p)
        return dx.to(x.dtype), dA.to(A.dtype), dB.to(B.dtype)
