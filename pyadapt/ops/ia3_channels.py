"""IA3 on the output channels of a frozen convolution, in plain torch: y * l, and dl = the sum of g * y * l / l.

See ``ia3.py`` for what is saved, and what happens near l = 0 and behind a change in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import registry
from .ia3 import Watch, least_factor
from .linear import compute_dtype


class ScaledChannels(registry.Function):
    """The output of a frozen convolution times l: y (batch, C, *size) or (C, *size), l (1, C, 1, ...).

    Saved are l, x, which the convolution saves as well, and the scaled output: the other one can go.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, l: Tensor, x: Tensor, owner: Any) -> Tensor:
        """y * l, rounded once; ``owner.frozen(x)`` is y, and is asked for again where l is too near to 0."""
        scaled = (y * l.flatten(0, 1)).to(y.dtype)
        ctx.saved = owner, None
        if not l.requires_grad:
            ctx.save_for_backward(l, None, None)
        else:
            ctx.saved = owner, Watch(scaled)
            ctx.save_for_backward(l, x, scaled.data)
        return scaled

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of y and l."""
        l, x, scaled = ctx.saved_tensors
        owner, watch = ctx.saved
        need_dy, need_dl = ctx.needs_input_grad[:2]
        factors = l.flatten(0, 1).to(compute_dtype(g))
        dl = None
        if need_dl:
            # All but the channels; the batch is there or not.
            axes = [axis for axis in range(g.dim()) if axis != g.dim() - factors.dim()]
            small = factors.abs() < least_factor(scaled.dtype)
            if watch.changed() or bool(small.any()):
                with torch.no_grad():
                    dl = (g.to(factors.dtype) * owner.frozen(x)).sum(axes)
            else:
                dl = (g.to(factors.dtype) * scaled).sum(axes) / factors.flatten()
            dl = dl.view(l.shape).to(l.dtype)
        return (g * factors).to(g.dtype) if need_dy else None, dl, None, None
