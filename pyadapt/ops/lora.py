"""LoRA on a frozen linear layer.

    S = drop(x) A'            y = x W' scale + bias + s S B'

Shapes: x (M, K), W (N, K), A (r, K), B (N, r), S (M, r), g = dL/dy (M, N); s is the scaling. With dS = dL/dS,

    dS = s g B                dx = g W + mask(dS A)
    dB = s g' S               dA = dS' drop(x)

where mask() is drop()'s own mask and 1 / (1 - p), made again from the seed. Saved for backward: x as it was given,
A, B, S and the seed. (Hu et al., "LoRA: low-rank adaptation of large language models", 2021.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import kernels, panels, registry, routes
from .linear import FrozenOwner, as_rows, compute_dtype, dense, like_rows
from .philox import dropout


def lora_forward_reference(
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
    """(y, S) in plain torch."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype)
        S = dropout(x, seed, dropout_p) @ A.to(dtype).t()
        y = x @ dense(weight, weight_scale, dtype).t()
        if bias is not None:
            y = y + bias.to(dtype)
        y = y + scaling * (S @ B.to(dtype).t())
        return y.to(out_dtype), S


def lora_backward_reference(
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
    """(dx, dA, dB) in plain torch; dx is empty when it is not asked for."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        g = g.to(dtype)
        dS = scaling * (g @ B.to(dtype))
        dA = dS.t() @ dropout(x.to(dtype), seed, dropout_p)
        dB = scaling * (g.t() @ S.to(dtype))
        if need_dx:
            dx = g @ dense(weight, weight_scale, dtype)
            dx = (dx + dropout(dS @ A.to(dtype), seed, dropout_p)).to(x.dtype)
        else:
            dx = x.new_empty(0)
        return dx, dA.to(A.dtype), dB.to(B.dtype)


def _fused_forward(x: Tensor, *rest: Any, skinny: bool = False) -> tuple[Tensor, Tensor]:
    return kernels.of(x).lora_forward(x, *rest, skinny)


def _fused_backward(g: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.of(g).lora_backward(g, *rest)


_FORWARD: dict[str, Callable[..., Any]] = {
    "fused": _fused_forward,
    "skinny": functools.partial(_fused_forward, skinny=True),
    "library": panels.lora_forward,
    "reference": lora_forward_reference,
}
_BACKWARD: dict[str, Callable[..., Any]] = {
    "fused": _fused_backward,
    "library": panels.lora_backward,
    "reference": lora_backward_reference,
}


def _lora_forward(
    x: Tensor, weight: Tensor, weight_scale: Any, bias: Any, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    _, dropout_p, _, out_dtype = rest
    case = routes.case_of("forward", x, weight, A.shape[0], out_dtype, (A.dtype, B.dtype))
    return routes.run(case, _FORWARD, x.device, (x, weight, weight_scale, bias, A, B, *rest), dropout_p > 0)


def _lora_backward(
    g: Tensor, x: Tensor, weight: Tensor, weight_scale: Any, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, dropout_p, _, _ = rest
    case = routes.case_of("backward", g, weight, A.shape[0], x.dtype, (A.dtype, B.dtype))
    return routes.run(case, _BACKWARD, g.device, (g, x, weight, weight_scale, A, B, *rest), dropout_p > 0)


def _lora_forward_fake(
    x: Tensor, weight: Tensor, weight_scale: Any, bias: Any, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=rest[-1])
    return y, x.new_empty((x.shape[0], A.shape[0]), dtype=compute_dtype(x))


def _lora_backward_fake(
    g: Tensor, x: Tensor, weight: Tensor, weight_scale: Any, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if rest[-1] else (0,))
    return dx, A.new_empty(A.shape), B.new_empty(B.shape)


registry.define(
    "lora_forward(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor A, Tensor B, float scaling, "
    "float dropout_p, Tensor? seed, ScalarType out_dtype) -> (Tensor y, Tensor S)",
    _lora_forward,
    fake=_lora_forward_fake,
)
registry.define(
    "lora_backward(Tensor g, Tensor x, Tensor weight, Tensor? weight_scale, Tensor A, Tensor B, Tensor S, "
    "float scaling, float dropout_p, Tensor? seed, bool need_dx) -> (Tensor dx, Tensor dA, Tensor dB)",
    _lora_backward,
    fake=_lora_backward_fake,
)


class LoraLinear(registry.Function):
    """A frozen linear layer with a LoRA adapter, over any leading dimensions of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        owner: FrozenOwner,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        out_dtype: torch.dtype,
        with_bias: bool = True,
    ) -> Tensor:
        """y (..., N) for x (..., K). ``owner.operands()`` is read here and again in backward, never kept.

        Without ``with_bias`` the owner's bias is left out of y, for layers whose bias is trained outside.
        """
        weight, weight_scale, bias = owner.operands()
        if not with_bias:
            bias = None
        pair = None if registry.watched(x, weight, A, B) else routes.pair(x, weight, out_dtype, A, B)
        if pair is not None and pair[0] in routes.NATIVE:
            skinny = pair[0] == "skinny"
            y, S = kernels.of(x).lora_forward(
                x, weight, weight_scale, bias, A, B, scaling, dropout_p, seed, out_dtype, skinny
            )
        else:
            form = torch.ops.pyadapt.lora_forward if pair is None else _FORWARD[pair[0]]
            y, S = form(as_rows(x), weight, weight_scale, bias, A, B, scaling, dropout_p, seed, out_dtype)
            y = like_rows(y, x)
        ctx.saved = owner, scaling, dropout_p, pair
        # x as it was given: where the rows had to be copied, they are copied again in backward.
        ctx.save_for_backward(x, A, B, S, seed)
        return y

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, A and B."""
        x, A, B, S, seed = ctx.saved_tensors
        owner, scaling, dropout_p, pair = ctx.saved
        weight, weight_scale, _ = owner.operands()
        need_dx = ctx.needs_input_grad[0]
        if pair is not None and registry.watched(g, weight):
            pair = None
        if pair is not None and pair[1] in routes.NATIVE:
            dx, dA, dB = kernels.of(g).lora_backward(
                g, x, weight, weight_scale, A, B, S, scaling, dropout_p, seed, need_dx
            )
        else:
            form = torch.ops.pyadapt.lora_backward if pair is None else _BACKWARD[pair[1]]
            dx, dA, dB = form(as_rows(g), as_rows(x), weight, weight_scale, A, B, S, scaling, dropout_p, seed, need_dx)
            dx = dx.view(x.shape) if need_dx else dx
        return dx if need_dx else None, dA, dB, None, None, None, None, None, None
