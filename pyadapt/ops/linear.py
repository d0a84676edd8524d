"""The frozen layer alone: y = x W' scale + bias and dx = g W, with W in 16 or 32 bits or int8.

Shapes: x (M, K), weight (N, K), weight_scale (N,) for int8 weights, bias (N,), g (M, N).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import kernels, panels, registry, routes


class FrozenOwner(Protocol):
    """A module that hands out its frozen weight. Read again in backward, never kept."""

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight (N, K), its scale (N,) or None, bias (N,) or None)."""
        ...


def compute_dtype(x: Tensor) -> torch.dtype:
    """Products are summed in fp32, in fp64 for fp64 input."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W in a floating dtype, the scale of an int8 weight multiplied in."""
    W = weight.to(dtype)
    return W if weight_scale is None else W * weight_scale.to(dtype)[:, None]


def as_rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K)."""
    return x.reshape(-1, x.shape[-1])


def like_rows(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) with the leading dimensions of x (..., K); no view, as what a Function gives may be changed in place."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def linear_forward_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """y = x W' scale + bias in plain torch."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y = x.to(dtype) @ dense(weight, weight_scale, dtype).t()
        if bias is not None:
            y = y + bias.to(dtype)
        return y.to(out_dtype)


def linear_dx_reference(g: Tensor, weight: Tensor, weight_scale: Tensor | None, x_dtype: torch.dtype) -> Tensor:
    """dx = g W in plain torch."""
    dtype = compute_dtype(g)
    with torch.autocast(g.device.type, enabled=False):
        return (g.to(dtype) @ dense(weight, weight_scale, dtype)).to(x_dtype)


def _fused_forward(x: Tensor, *rest: Any, skinny: bool = False) -> Tensor:
    return kernels.of(x).linear_forward(x, *rest, skinny)


def _fused_dx(g: Tensor, *rest: Any) -> Tensor:
    return kernels.of(g).linear_dx(g, *rest)


_FORWARD: dict[str, Callable[..., Any]] = {
    "fused": _fused_forward,
    "skinny": functools.partial(_fused_forward, skinny=True),
    "library": panels.linear_forward,
    "reference": linear_forward_reference,
}
_DX: dict[str, Callable[..., Tensor]] = {
    "fused": _fused_dx,
    "library": panels.linear_dx,
    "reference": linear_dx_reference,
}


def frozen_forward(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """y = x W' scale + bias by whichever route serves."""
    case = routes.case_of("forward", x, weight, 0, out_dtype)
    return routes.run(case, _FORWARD, x.device, (x, weight, weight_scale, bias, out_dtype))


def frozen_dx(g: Tensor, weight: Tensor, weight_scale: Tensor | None, x_dtype: torch.dtype) -> Tensor:
    """dx = g W by whichever route serves."""
    case = routes.case_of("backward", g, weight, 0, x_dtype)
    return routes.run(case, _DX, g.device, (g, weight, weight_scale, x_dtype))


registry.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
    frozen_forward,
    fake=lambda x, weight, weight_scale, bias, out_dtype: x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype),
)
registry.define(
    "linear_dx(Tensor g, Tensor weight, Tensor? weight_scale, ScalarType x_dtype) -> Tensor",
    frozen_dx,
    fake=lambda g, weight, weight_scale, x_dtype: g.new_empty((g.shape[0], weight.shape[1]), dtype=x_dtype),
)


class FrozenLinear(registry.Function):
    """A frozen linear layer over any leading dimensions: saves nothing, reads W again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: FrozenOwner, out_dtype: torch.dtype, with_bias: bool = True) -> Tensor:
        """y (..., N) for x (..., K). Without ``with_bias`` the owner's bias is left out of y."""
        weight, weight_scale, bias = owner.operands()
        if not with_bias:
            bias = None
        pair = None if registry.watched(x, weight) else routes.pair(x, weight, out_dtype)
        ctx.saved = owner, x.dtype, pair
        if pair is not None and pair[0] in routes.NATIVE:
            return kernels.of(x).linear_forward(x, weight, weight_scale, bias, out_dtype, pair[0] == "skinny")
        form = torch.ops.pyadapt.linear_forward if pair is None else _FORWARD[pair[0]]
        return like_rows(form(as_rows(x), weight, weight_scale, bias, out_dtype), x)

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None]:
        """dx = g W."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        owner, x_dtype, pair = ctx.saved
        weight, weight_scale, _ = owner.operands()
        if pair is not None and registry.watched(g, weight):
            pair = None
        if pair is not None and pair[1] in routes.NATIVE:
            return kernels.of(g).linear_dx(g, weight, weight_scale, x_dtype), None, None, None
        form = torch.ops.pyadapt.linear_dx if pair is None else _DX[pair[1]]
        return like_rows(form(as_rows(g), weight, weight_scale, x_dtype), g), None, None, None
