"""The ``library`` route: torch's own GEMM for the frozen products, the low-rank passes before and after it.

An int8 W, or one of another dtype than x, is converted a panel at a time into a buffer that the caches hold, cut so
that each panel gives finished columns of the product: nothing is summed in 16 bits, no 16-bit copy of W ever exists. In
bf16 the panel of an int8 W holds the integers, which are exact, and the row scale multiplies y after the product and g
before it. In fp16 such a product could overflow: there a forward panel holds W itself, and in dx g carries 128 times
the scale (about the largest weight of the row), the panel the 128th of the integers.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from pyadapt.native import device_kind

from . import kernels
from .philox import dropout
from .routes import native_serves

# From this rank on torch's bf16 GEMM makes S faster than the native pass.
_GEMM_RANK = 32

# About two megabytes for a CPU core's cache, sixteen for a GPU's.
_PANEL_ELEMENTS, _PANEL_ELEMENTS_CUDA = 1 << 20, 1 << 23


_NOTHING = contextlib.nullcontext()


def no_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """A block whose products are not autocast; where autocast is off anyway, at a small part of its cost."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def _panel(q: Tensor, scale: Tensor | None, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """q scale factor in ``dtype``, laid out as q is; a scale goes with rows. A floating W has neither."""
    if q.dtype != torch.int8:
        return q.to(dtype)
    if q.stride(1) != 1 and scale is None:
        return _panel(q.t(), None, dtype, factor).t()
    if native_serves(q, dtype) and q.stride(1) == 1:
        return kernels.of(q).dequantize_rows(q, scale, dtype, factor)
    if scale is None:
        return q.to(dtype) if factor == 1.0 else q.to(dtype) * factor
    return (q.to(torch.float32) * (scale * factor)[:, None]).to(dtype)


def _panel_width(tensor: Tensor, length: int) -> int:
    elements = _PANEL_ELEMENTS_CUDA if tensor.is_cuda else _PANEL_ELEMENTS
    return max(64, elements // max(length, 1) // 64 * 64)


def dx_factor(dtype: torch.dtype) -> float:
    """What g carries beside the row scale of an int8 W, and the integers are divided by, in ``times_weight``."""
    return 128.0 if dtype == torch.float16 else 1.0


def times_weight_t(x: Tensor, weight: Tensor, weight_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x W' in x's dtype, and the scale (N,) that its columns still lack, if they do."""
    if weight.dtype == x.dtype:
        return torch.mm(x, weight.t()), None
    in_panel = weight_scale if x.dtype == torch.float16 else None
    N, K = weight.shape
    y = x.new_empty((x.shape[0], N))
    for n in range(0, N, width := _panel_width(x, K)):
        columns = slice(n, n + width)
        panel = _panel(weight[columns], None if in_panel is None else in_panel[columns], x.dtype)
        torch.mm(x, panel.t(), out=y[:, columns])
    return y, weight_scale if in_panel is None else None


def scaled_for_dx(g: Tensor, weight_scale: Tensor | None) -> Tensor:
    """What ``times_weight`` multiplies in the place of g: over int8 the row scale lies on the axis that is summed."""
    return g if weight_scale is None else (g * (weight_scale * dx_factor(g.dtype))).to(g.dtype)


def times_weight(left: Tensor, weight: Tensor) -> Tensor:
    """g W in g's dtype for left = ``scaled_for_dx(g)``."""
    if weight.dtype == left.dtype:
        return torch.mm(left, weight)
    N, K = weight.shape
    dx = left.new_empty((left.shape[0], K))
    for k in range(0, K, width := _panel_width(left, N)):
        panel = _panel(weight[:, k : k + width], None, left.dtype, 1.0 / dx_factor(left.dtype))
        torch.mm(left, panel, out=dx[:, k : k + width])
    return dx


def linear_forward(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """y = x W' scale + bias."""
    with no_autocast(x.device.type):
        y, lacking = times_weight_t(x, weight, weight_scale)
        if lacking is not None:
            y = y * lacking
        if bias is not None:
            y = y + bias
        return y.to(out_dtype)


def linear_dx(g: Tensor, weight: Tensor, weight_scale: Tensor | None, x_dtype: torch.dtype) -> Tensor:
    """dx = g W."""
    with no_autocast(g.device.type):
        return times_weight(scaled_for_dx(g, weight_scale), weight).to(x_dtype)


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
    if native_serves(x, x.dtype, out_dtype):
        native = kernels.of(x)
        if _has_bf16_gemm(x, weight.dtype, out_dtype, x.dtype if bias is None else bias.dtype):
            return _bf16_forward(x, weight, bias, A, B, scaling, dropout_p, seed)
        S = native.shrink(x, A, dropout_p, seed, out_dtype)
        with no_autocast(x.device.type):
            y, lacking = times_weight_t(x, weight, weight_scale)
        return native.expand_(y.to(out_dtype), S, B, lacking, bias, scaling), S
    with no_autocast(x.device.type):
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
    if native_serves(x, x.dtype, g.dtype) and _has_bf16_gemm(x, g.dtype):
        return _bf16_backward(g, x, weight, weight_scale, A, B, S, scaling, dropout_p, seed, need_dx)
    if native_serves(x, x.dtype, g.dtype):
        native = kernels.of(x)
        scale = weight_scale if need_dx else None
        dS, dA, dB, left = native.gradients(g, x, A, B, S, scaling, dropout_p, seed, scale, dx_factor(g.dtype))
        if need_dx:
            with no_autocast(x.device.type):
                dx = times_weight(left, weight).to(x.dtype)
            native.expand_dx_(dx, dS, A, dropout_p, seed)
        return dx, dA, dB
    with no_autocast(x.device.type):
        wide = g.float()
        dS = scaling * (wide @ B.float())
        dA = dS.t() @ dropout(x.float(), seed, dropout_p)
        dB = scaling * (wide.t() @ S)
        if need_dx:
            dx = linear_dx(g, weight, weight_scale, torch.float32) + dropout(dS @ A.float(), seed, dropout_p)
        return dx.to(x.dtype), dA.to(A.dtype), dB.to(B.dtype)


def _has_bf16_gemm(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether torch's GEMM serves the low-rank passes as well: on a CPU in bf16, where it is the fastest."""
    return device_kind(x) == "cpu" and all(dtype == torch.bfloat16 for dtype in (x.dtype, *dtypes))


def _times(scaling: float, B: Tensor) -> Tensor:
    return B if scaling == 1.0 else scaling * B


def _bf16_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`lora_forward` where every product is one of bf16 matrices."""
    with no_autocast("cpu"):
        if dropout_p > 0 or A.shape[0] < _GEMM_RANK:
            S = kernels.cpu.shrink(x, A, dropout_p, seed, x.dtype)
            short = S.to(x.dtype)
        else:
            short = torch.mm(x, A.to(x.dtype).t())
            S = short.float()
        return F.linear(x, weight, bias).addmm_(short, _times(scaling, B).to(x.dtype).t()), S


def _bf16_backward(
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
    """`lora_backward` where every product is one of bf16 matrices, the sums over M of a left side that lies by rows."""
    dx, dropped = x.new_empty(0), dropout_p > 0
    with no_autocast("cpu"):
        dS = torch.mm(g, _times(scaling, B).to(g.dtype))
        scaled_St = torch.mul(S.t(), scaling, out=g.new_empty(S.shape[1], S.shape[0]))
        dB = torch.mm(scaled_St, g).t().to(B.dtype, memory_format=torch.contiguous_format)
        if dropped:
            dA = kernels.cpu.input_gradient(dS, x, A, dropout_p, seed)
        else:
            dA = torch.mm(dS.t().contiguous(), x).to(A.dtype)
        if need_dx:
            dx = times_weight(scaled_for_dx(g, weight_scale), weight)
            dx = kernels.cpu.expand_dx_(dx, dS, A, dropout_p, seed) if dropped else dx.addmm_(dS, A.to(g.dtype))
    return dx, dA, dB
