"""What DoRA adds to a low-rank product: the row norms of the moved weight, and a factor for each output feature.

    norm[n] = |W[n, :] + s (B A)[n, :]|             y[m, n] = c[n] z[m, n] + bias[n]

Shapes: W (N, K), weight_scale (N,) for int8 weights, A (r, K), B (N, r), z and y (M, N), c and bias (N,).

W + s B A is never formed. The square is expanded into Gram terms, which cost about the products of W A':

    norm^2 = |W|^2 + 2 s (W A') . B + s^2 (B A A') . B

They are summed in fp64, a panel of W at a time: where B A nearly cancels W the terms cancel too, and in fp32 the norm
would be off by a third at |W + s B A| = |W| / 1000 (docs/kernels.md has the errors).
(Liu et al., "DoRA: weight-decomposed low-rank adaptation", 2024.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import registry
from .linear import dense

_PANEL_ELEMENTS = 1 << 18


def norm_dtype(weight: Tensor, A: Tensor) -> torch.dtype:
    """Norms come out in fp32, in fp64 where the weight or A has that dtype."""
    return torch.float64 if torch.float64 in (weight.dtype, A.dtype) else torch.float32


def row_norms_reference(weight: Tensor, weight_scale: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """norm (N,) with the whole of W + s B A in memory."""
    dtype = norm_dtype(weight, A)
    with torch.autocast(weight.device.type, enabled=False):
        moved = dense(weight, weight_scale, dtype) + scaling * (B.to(dtype) @ A.to(dtype))
        return torch.linalg.vector_norm(moved, dim=1)


def _row_norms(weight: Tensor, weight_scale: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        A64, B64 = A.double(), scaling * B.double()
        squares, cross = _gram_terms(weight, A64)
        if weight_scale is not None:
            # Integers are exact; their scale is that of a whole row.
            scale = weight_scale.double()
            squares, cross = squares * scale.square(), cross * scale[:, None]
        squares += torch.linalg.vecdot(2 * cross + B64 @ (A64 @ A64.t()), B64)
        return squares.clamp_min_(0).sqrt_().to(norm_dtype(weight, A))


def _gram_terms(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """(|W|^2 (N,), W A' (N, r)) in the dtype of A, a panel of W at a time."""
    N, K = weight.shape
    squares, cross = A.new_zeros(N), A.new_zeros(N, A.shape[0])
    if weight.stride(0) == 1 and K > 1:
        # Conv1D stores W': panels are columns of W then, so that they are read as they lie.
        width = max(1, _PANEL_ELEMENTS // max(N, 1))
        for part in (slice(k, k + width) for k in range(0, K, width)):
            panel = weight[:, part].to(A.dtype)
            squares += torch.linalg.vecdot(panel, panel)
            cross.addmm_(panel, A[:, part].t())
        return squares, cross
    height = max(1, _PANEL_ELEMENTS // max(K, 1))
    for part in (slice(n, n + height) for n in range(0, N, height)):
        panel = weight[part].to(A.dtype)
        squares[part] = torch.linalg.vecdot(panel, panel)
        torch.mm(panel, A.t(), out=cross[part])
    return squares, cross


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
