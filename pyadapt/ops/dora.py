"""What DoRA adds to a low-rank product: the row norms of the moved weight, and a factor for each output feature.

    norm[n] = |W[n, :] + s (B A)[n, :]|             y[m, n] = c[n] z[m, n] + bias[n]

Shapes: W (N, K), weight_scale (N,) for int8 weights, A (r, K), B (N, r), z and y (M, N), c and bias (N,).

The norm forms W + s B A a panel of about one megabyte at a time, in fp32: that costs the products of W A', reads W once
and holds no second weight. Expanding the square, |W|^2 + 2 s (W A') . B + s^2 B (A A') B', costs the same but loses
all digits where B A nearly cancels W: at |W + s B A| = |W| / 1000 the norm is off by a third, in panels by 1e-5.
(Liu et al., "DoRA: weight-decomposed low-rank adaptation", 2024.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import quantize, registry  # noqa: F401 - quantize defines the op dequantize_rows
from .linear import dense

_PANEL_ELEMENTS = 1 << 18


def norm_dtype(weight: Tensor, A: Tensor) -> torch.dtype:
    """Norms are summed in fp32, in fp64 where the weight or A has that dtype."""
    return torch.float64 if torch.float64 in (weight.dtype, A.dtype) else torch.float32


def row_norms_reference(weight: Tensor, weight_scale: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """norm (N,) with the whole of W + s B A in memory."""
    dtype = norm_dtype(weight, A)
    with torch.autocast(weight.device.type, enabled=False):
        moved = dense(weight, weight_scale, dtype) + scaling * (B.to(dtype) @ A.to(dtype))
        return torch.linalg.vector_norm(moved, dim=1)


def _row_norms(weight: Tensor, weight_scale: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    dtype = norm_dtype(weight, A)
    N, K = weight.shape
    squares = torch.zeros(N, dtype=dtype, device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        A, B = scaling * A.to(dtype), B.to(dtype)
        if weight.stride(0) == 1 and K > 1:
            # Conv1D stores W': panels are columns of W then, so that they are read as they lie.
            width = max(1, _PANEL_ELEMENTS // max(N, 1))
            for part in (slice(k, k + width) for k in range(0, K, width)):
                panel = A[:, part].t() @ B.t()
                panel += dense(weight[:, part], weight_scale, dtype).t()
                squares += panel.square_().sum(0)
        else:
            height = max(1, _PANEL_ELEMENTS // max(K, 1))
            for part in (slice(n, n + height) for n in range(0, N, height)):
                panel = B[part] @ A
                panel += weight[part] if weight_scale is None else _dequantized(weight[part], weight_scale[part], dtype)
                torch.sum(panel.square_(), dim=1, out=squares[part])
    return squares.sqrt_()


def _dequantized(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.pyadapt.dequantize_rows(weight, weight_scale, dtype)


registry.define(
    "row_norms(Tensor weight, Tensor? weight_scale, Tensor A, Tensor B, float scaling) -> Tensor",
    _row_norms,
    fake=lambda weight, weight_scale, A, B, scaling: weight.new_empty(weight.shape[0], dtype=norm_dtype(weight, A)),
)


class ScaleFeatures(torch.autograd.Function):
    """y = c z + bias along one dimension, in fp32 (fp64) and rounded once to the dtype of z; saves z and c."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, c: Tensor, bias: Tensor | None, dim: int = -1) -> Tensor:
        """y as z, whose size along `dim` is N; c (N,), bias (N,) or None."""
        ctx.save_for_backward(z, c)
        ctx.dim = dim % z.dim()
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide = z.to(torch.promote_types(z.dtype, c.dtype))
        c = _along(c, wide, ctx.dim)
        y = wide * c if bias is None else torch.addcmul(_along(bias, wide, ctx.dim), wide, c)
        return y.to(z.dtype)

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """dz = c g, dc = sum g z, dbias = sum g."""
        z, c = ctx.saved_tensors
        need_z, need_c, need_bias = ctx.needs_input_grad[:3]
        wide = g.to(torch.promote_types(g.dtype, c.dtype))
        others = [dim for dim in range(g.dim()) if dim != ctx.dim]
        dz = (wide * _along(c, wide, ctx.dim)).to(z.dtype) if need_z else None
        dc = _sum(wide * z, others).to(c.dtype) if need_c else None
        dbias = _sum(wide, others).to(ctx.bias_dtype) if need_bias else None
        return dz, dc, dbias, None


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """`values` (N,) in the dtype of `like`, shaped to be broadcast along its dimension `dim`."""
    return values.to(like.dtype).view([-1 if i == dim else 1 for i in range(like.dim())])


def _sum(values: Tensor, dims: list[int]) -> Tensor:
    # torch takes no dimensions for all of them.
    return values.sum(dims) if dims else values
