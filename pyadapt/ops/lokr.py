"""LoKr on a frozen linear layer: a Kronecker product beside W that is never formed.

    y = x W' scale + bias + s f * (x kron(w1, w2)'),        w2 = up down, or down where there is no up

A token's x is seen as X (c, d), its y as Y (a, b), so that the term is three small products of matrices:

    U = X down'  (c, h)      V = w1 U  (a, h)      Y += s f * (V up')

Shapes: x (M, c d), W (a b, c d), w1 (a, c), down (h, d), up (b, h), f (a b,), which rank dropout makes (ones where it
is None); h is the rank of w2, or b where w2 is full. With G = s f * g seen as (a, b):

    dV = G up       dU = w1' dV      dX = (g W) + dU down
    d_up = G' V     dw1 = dV U'      d_down = dU' X            (the last three summed over the tokens)

Saved for backward: x as it was given, the factors and f; U and V are made again. (Yeh et al., "Navigating text-to-image
customization: from LyCORIS fine-tuning to model evaluation", 2024.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyadapt import native

from . import kernels, registry, routes
from .linear import FrozenOwner, as_rows, compute_dtype, frozen_dx, frozen_forward, like_rows

# What the kernel keeps of a token, and of the factors, stays in a core's cache up to this many elements.
LARGEST_FACTOR = 1 << 18


def kernel_serves(x: Tensor, out_dtype: torch.dtype, down: Tensor, up: Tensor | None) -> bool:
    """Whether the native kernel takes the term: on the CPU, with a right factor that its caches hold."""
    largest = max(down.numel(), 0 if up is None else up.numel())
    on_cpu = native.device_kind(x) == "cpu"
    return on_cpu and largest <= LARGEST_FACTOR and routes.native_serves(x, x.dtype, out_dtype)


def term_reference(
    x: Tensor, w1: Tensor, down: Tensor, up: Tensor | None, factors: Tensor | None, scaling: float
) -> Tensor:
    """The term (M, a b) in plain torch, in the dtype that products are summed in."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        w1, down = w1.to(dtype), down.to(dtype)
        U = x.to(dtype).view(x.shape[0], w1.shape[1], down.shape[1]) @ down.t()
        V = _mix(w1, U)
        term = (V if up is None else V @ up.to(dtype).t()).flatten(1)
        return scaling * (term if factors is None else term * factors.to(dtype))


def term_gradients_reference(
    g: Tensor, x: Tensor, w1: Tensor, down: Tensor, up: Tensor | None, factors: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(the term's part of dx, dw1, d_down, d_up) in plain torch, in the dtype that products are summed in."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        w1, down = w1.to(dtype), down.to(dtype)
        X = x.to(dtype).view(x.shape[0], w1.shape[1], down.shape[1])
        U = X @ down.t()
        G = scaling * (g.to(dtype) if factors is None else g.to(dtype) * factors.to(dtype))
        dV = G = G.view(g.shape[0], w1.shape[0], g.shape[1] // w1.shape[0])
        d_up = None
        if up is not None:
            dV = G @ up.to(dtype)
            d_up = G.flatten(0, 1).t() @ _mix(w1, U).flatten(0, 1)
        dU = _mix(w1.t(), dV)
        dw1 = torch.einsum("mpj,mij->pi", dV, U)
        return (dU @ down).flatten(1), dw1, dU.flatten(0, 1).t() @ X.flatten(0, 1), d_up


def _mix(w: Tensor, U: Tensor) -> Tensor:
    """w U for each token's U, in one product."""
    return torch.einsum("pi,mij->mpj", w, U)


def _float(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.float().contiguous() for tensor in tensors]


def _forward(
    x: Tensor,
    weight: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    w1: Tensor,
    down: Tensor,
    up: Tensor | None,
    factors: Tensor | None,
    scaling: float,
    out_dtype: torch.dtype,
) -> Tensor:
    if weight is None:
        features = w1.shape[0] * (down if up is None else up).shape[0]
        y = x.new_zeros((x.shape[0], features), dtype=out_dtype)
    else:
        y = frozen_forward(x, weight, weight_scale, bias, out_dtype)
    if kernel_serves(x, out_dtype, down, up):
        return kernels.of(x).lokr_forward_(y, x, *_float(w1, down, up, factors), scaling)
    return (y + term_reference(x, w1, down, up, factors, scaling)).to(out_dtype)


def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    weight_scale: Tensor | None,
    w1: Tensor,
    down: Tensor,
    up: Tensor | None,
    factors: Tensor | None,
    scaling: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not need_dx:
        dx = x.new_empty(0)
    else:
        dx = x.new_zeros(x.shape) if weight is None else frozen_dx(g, weight, weight_scale, x.dtype)
    if kernel_serves(x, g.dtype, down, up):
        added = dx if need_dx else None
        dw1, d_down, d_up = kernels.of(x).lokr_backward_(added, g, x, *_float(w1, down, up, factors), scaling)
    else:
        term, dw1, d_down, d_up = term_gradients_reference(g, x, w1, down, up, factors, scaling)
        dx = (dx + term).to(x.dtype) if need_dx else dx
    d_up = x.new_empty(0) if up is None or d_up is None else d_up.to(up.dtype)
    return dx, dw1.to(w1.dtype), d_down.to(down.dtype), d_up


def _forward_fake(x: Tensor, weight: Any, weight_scale: Any, bias: Any, *rest: Any) -> Tensor:
    w1, down, up, _, _, out_dtype = rest
    return x.new_empty((x.shape[0], w1.shape[0] * (down if up is None else up).shape[0]), dtype=out_dtype)


def _backward_fake(g: Tensor, x: Tensor, weight: Any, weight_scale: Any, *rest: Any) -> tuple[Tensor, ...]:
    w1, down, up, _, _, need_dx = rest
    dx = x.new_empty(x.shape if need_dx else (0,))
    d_up = x.new_empty(0) if up is None else up.new_empty(up.shape)
    return dx, w1.new_empty(w1.shape), down.new_empty(down.shape), d_up


registry.define(
    "lokr_forward(Tensor x, Tensor? weight, Tensor? weight_scale, Tensor? bias, Tensor w1, Tensor down, Tensor? up, "
    "Tensor? factors, float scaling, ScalarType out_dtype) -> Tensor",
    _forward,
    fake=_forward_fake,
)
registry.define(
    "lokr_backward(Tensor g, Tensor x, Tensor? weight, Tensor? weight_scale, Tensor w1, Tensor down, Tensor? up, "
    "Tensor? factors, float scaling, bool need_dx) -> (Tensor dx, Tensor dw1, Tensor d_down, Tensor d_up)",
    _backward,
    fake=_backward_fake,
)


class LokrLinear(registry.Function):
    """A frozen linear layer with a LoKr adapter, or without an owner the adapter's term alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        down: Tensor,
        up: Tensor | None,
        factors: Tensor | None,
        owner: FrozenOwner | None,
        scaling: float,
        out_dtype: torch.dtype,
        with_bias: bool = True,
    ) -> Tensor:
        """y (..., a b) for x (..., c d). ``owner.operands()`` is read here and again in backward, never kept.

        Without ``with_bias`` the owner's bias is left out of y, for layers whose bias is trained outside.
        """
        weight, weight_scale, bias = (None, None, None) if owner is None else owner.operands()
        if not with_bias:
            bias = None
        watched = _watched(x, weight, w1, down, up)
        pair = None if watched or weight is None else routes.native_pair(x, weight, out_dtype)
        ctx.owner, ctx.scaling, ctx.is_native = owner, scaling, False
        if pair is not None and kernel_serves(x, out_dtype, down, up):
            ctx.is_native = True
            core = kernels.of(x)
            y = core.linear_forward(x, weight, weight_scale, bias, out_dtype, pair[0] == "skinny")
            core.lokr_forward_(y, x, *_float(w1, down, up, factors), scaling)
        else:
            op = torch.ops.pyadapt.lokr_forward if watched else _forward
            arguments = weight, weight_scale, bias, w1, down, up, factors, scaling, out_dtype
            y = like_rows(op(as_rows(x), *arguments), x)
        # x as it was given: where the rows had to be copied, they are copied again in backward.
        ctx.save_for_backward(x, w1, down, up, factors)
        return y

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, w1, down and up."""
        x, w1, down, up, factors = ctx.saved_tensors
        weight, weight_scale = (None, None) if ctx.owner is None else ctx.owner.operands()[:2]
        need_dx = ctx.needs_input_grad[0]
        watched = _watched(g, weight, w1, down, up)
        if ctx.is_native and not watched:
            core = kernels.of(x)
            dx = core.linear_dx(g, weight, weight_scale, x.dtype) if need_dx else None
            dw1, d_down, d_up = core.lokr_backward_(dx, g, x, *_float(w1, down, up, factors), ctx.scaling)
            d_up = None if up is None else d_up.to(up.dtype)
            return dx, dw1.to(w1.dtype), d_down.to(down.dtype), d_up, None, None, None, None, None
        op = torch.ops.pyadapt.lokr_backward if watched else _backward
        dx, dw1, d_down, d_up = op(
            as_rows(g), as_rows(x), weight, weight_scale, w1, down, up, factors, ctx.scaling, need_dx
        )
        dx = dx.view(x.shape) if need_dx else None
        return dx, dw1, d_down, None if up is None else d_up, None, None, None, None, None


def _watched(x: Tensor, *tensors: Tensor | None) -> bool:
    return registry.watched(x, *(tensor for tensor in tensors if tensor is not None))
