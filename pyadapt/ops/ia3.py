"""IA3 on a frozen linear layer: a learned factor for each output or for each input feature.

    output side    y = (x W' + b) * l           dx = (g * l) W         dl = sum over m of g * y / l
    input side     y = (x * l) W' + b           dx = l * (g W)         dl = sum over m of x * (g W)

Shapes: x (M, K), W (N, K), y and g = dL/dy (M, N); l (N,) or (K,). The factors of the output go into the epilogue of
the product, those of the input into the pass that reads x. Saved for backward: l, x as it was given and, on the output
side, y itself, which the layer after it holds as well.

Near l = 0 the quotient y / l says little: y has underflowed, or lost digits that the product had (``least_factor``).
The product is computed again for those columns. A layer behind this one may also have changed y in place (ReLU does, if
told to), as it may with a plain linear layer: y's version says so, and then all columns are computed again.
(Liu et al., "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning", 2022.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyadapt import native

from . import kernels, panels, registry, routes
from .columns import column_dots, scale_columns_, scaled_columns, scaled_with_dots
from .linear import FrozenOwner, as_rows, compute_dtype, dense, frozen_dx, frozen_forward, like_rows


@functools.cache
def least_factor(y_dtype: torch.dtype) -> float:
    """The |l| from which on the gradient is read off y: below it y / l is computed again.

    An element of the product that is no smaller than the dtype's rounding step keeps all its digits in y, and a product
    g * y with both at 2^-63 (fp64: 2^-511) or above is no subnormal number of the dtype that it is summed in.
    """
    info = torch.finfo(y_dtype)
    summed = torch.finfo(torch.float64 if y_dtype == torch.float64 else torch.float32)
    return max(info.tiny / info.eps, math.sqrt(summed.tiny))


def _both(weight_scale: Tensor | None, l: Tensor) -> Tensor:
    return l if weight_scale is None else weight_scale * l


# --- output side ---


def output_forward_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, l: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """y = (x W' scale + bias) * l in plain torch."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y = x.to(dtype) @ dense(weight, weight_scale, dtype).t()
        if bias is not None:
            y = y + bias.to(dtype)
        return (y * l.to(dtype)).to(out_dtype)


def _output_forward_library(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, l: Tensor, out_dtype: torch.dtype
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y, lacking = panels.times_weight_t(x, weight, weight_scale)
        return scale_columns_(y.to(out_dtype), _both(lacking, l), None if bias is None else bias * l)


def _output_forward_fused(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    l: Tensor,
    out_dtype: torch.dtype,
    skinny: bool = False,
) -> Tensor:
    if native.device_kind(x) != "cpu" and weight_scale is None:
        # The CUDA kernels scale the columns of an int8 weight alone.
        return scale_columns_(kernels.of(x).linear_forward(x, weight, None, bias, out_dtype, skinny), l)
    scaled_bias = None if bias is None else bias * l
    return kernels.of(x).linear_forward(x, weight, _both(weight_scale, l), scaled_bias, out_dtype, skinny)


_OUTPUT_FORWARD: dict[str, Callable[..., Tensor]] = {
    "fused": _output_forward_fused,
    "skinny": functools.partial(_output_forward_fused, skinny=True),
    "library": _output_forward_library,
    "reference": output_forward_reference,
}


def _dl_of_columns(
    g: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, columns: Tensor | slice
) -> Tensor:
    """dl of some columns, or of a slice of them, from their product, computed again."""
    scale, shift = (None if rows is None else rows[columns] for rows in (weight_scale, bias))
    # A few columns can be had as they are summed; the whole product is as large as y, and no larger.
    dtype = g.dtype if isinstance(columns, slice) else compute_dtype(x)
    return column_dots(g[:, columns], frozen_forward(x, weight[columns], scale, shift, dtype))


def _correct_(
    dl: Tensor, g: Tensor, x: Tensor, weight: Tensor, weight_scale: Any, bias: Any, l: Tensor, y_dtype: torch.dtype
) -> None:
    """Put into dl the columns whose l is too near to 0, from the product itself."""
    small = l.abs() < least_factor(y_dtype)
    if g.is_cuda and torch.cuda.is_current_stream_capturing():
        # Nothing can be asked while a graph is recorded.
        dl.copy_(torch.where(small, _dl_of_columns(g, x, weight, weight_scale, bias, slice(None)), dl))
    elif bool(small.any()):
        columns = small.nonzero().flatten()
        dl[columns] = _dl_of_columns(g, x, weight, weight_scale, bias, columns)


def _output_backward(
    g: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    l: Tensor,
    need_dx: bool,
    need_dl: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dl), each empty when it is not asked for; y is None where it is not what the layer has given any more."""
    factors = l.to(compute_dtype(g))
    dx, dots = x.new_empty(0), factors.new_empty(0)
    with torch.autocast(g.device.type, enabled=False):
        if need_dx:
            dx, dots = _output_dx(g, x, weight, weight_scale, factors, y if need_dl else None)
        if need_dl and y is None:
            dots = _dl_of_columns(g, x, weight, weight_scale, bias, slice(None))
        elif need_dl and y is not None:
            dots = dots if dots.numel() == factors.numel() else column_dots(g, y)
            dots = dots / factors
            _correct_(dots, g, x, weight, weight_scale, bias, factors, y.dtype)
        return dx, dots.to(l.dtype)


def _output_dx(
    g: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor | None, l: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx, and the sums of g y, if there is a y and they come with it in one pass."""
    case = routes.case_of("backward", g, weight, 0, x.dtype)
    route = routes.choose(case)
    if route == "fused" and native.device_kind(g) == "cpu":
        return kernels.cpu.linear_dx(g, weight, _both(weight_scale, l), x.dtype), l.new_empty(0)
    if route == "library":
        scale = _both(weight_scale, l) * (panels.dx_factor(g.dtype) if weight_scale is not None else 1.0)
        left, dots = (scaled_columns(g, scale), l.new_empty(0)) if y is None else scaled_with_dots(g, y, scale)
        return panels.times_weight(left, weight).to(x.dtype), dots
    if y is None:
        return frozen_dx(scaled_columns(g, l), weight, weight_scale, x.dtype), l.new_empty(0)
    left, dots = scaled_with_dots(g, y, l)
    return frozen_dx(left, weight, weight_scale, x.dtype), dots


# --- input side ---


def input_forward_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, l: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """y = (x * l) W' scale + bias in plain torch."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y = (x.to(dtype) * l.to(dtype)) @ dense(weight, weight_scale, dtype).t()
        if bias is not None:
            y = y + bias.to(dtype)
        return y.to(out_dtype)


def _input_forward_library(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, l: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return panels.linear_forward(scaled_columns(x, l), weight, weight_scale, bias, out_dtype)


def _input_forward_fused(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    l: Tensor,
    out_dtype: torch.dtype,
    skinny: bool = False,
) -> Tensor:
    if native.device_kind(x) != "cpu":
        return kernels.of(x).linear_forward(scaled_columns(x, l), weight, weight_scale, bias, out_dtype, skinny)
    return kernels.cpu.scaled_linear_forward(x, l, weight, weight_scale, bias, out_dtype, skinny)


_INPUT_FORWARD: dict[str, Callable[..., Tensor]] = {
    "fused": _input_forward_fused,
    "skinny": functools.partial(_input_forward_fused, skinny=True),
    "library": _input_forward_library,
    "reference": input_forward_reference,
}


def _forward(
    forms: Mapping[str, Callable[..., Tensor]],
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    l: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """y by whichever form of a side serves."""
    case = routes.case_of("forward", x, weight, 0, out_dtype)
    # Summed in fp32, or fp64: so l is read as that, whatever it is stored in.
    return routes.run(case, forms, x.device, (x, weight, weight_scale, bias, l.to(compute_dtype(x)), out_dtype))


_output_forward = functools.partial(_forward, _OUTPUT_FORWARD)
_input_forward = functools.partial(_forward, _INPUT_FORWARD)


def _input_backward(
    g: Tensor, x: Tensor, weight: Tensor, weight_scale: Tensor | None, l: Tensor, need_dx: bool, need_dl: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dl), each empty when it is not asked for."""
    factors = l.to(compute_dtype(x))
    dx, dots = frozen_dx(g, weight, weight_scale, x.dtype), factors.new_empty(0)
    if need_dx and need_dl:
        dx, dots = scaled_with_dots(dx, x, factors, in_place=True)
    elif need_dl:
        dots = column_dots(dx, x)
    elif need_dx:
        dx = scale_columns_(dx, factors)
    return dx if need_dx else x.new_empty(0), dots.to(l.dtype)


# --- the ops, and the Functions on them ---


def _forward_fake(x: Tensor, weight: Tensor, weight_scale: Any, bias: Any, l: Tensor, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


def _backward_fake(
    g: Tensor, x: Tensor, weight: Tensor, l: Tensor, need_dx: bool, need_dl: bool
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty((g.shape[0], weight.shape[1]) if need_dx else (0,))
    return dx, l.new_empty(l.shape if need_dl else (0,))


_WEIGHT = "Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor l"
registry.define(
    f"ia3_output_forward(Tensor x, {_WEIGHT}, ScalarType out_dtype) -> Tensor", _output_forward, fake=_forward_fake
)
registry.define(
    f"ia3_input_forward(Tensor x, {_WEIGHT}, ScalarType out_dtype) -> Tensor", _input_forward, fake=_forward_fake
)
registry.define(
    f"ia3_output_backward(Tensor g, Tensor x, Tensor? y, {_WEIGHT}, bool need_dx, bool need_dl) "
    "-> (Tensor dx, Tensor dl)",
    _output_backward,
    fake=lambda g, x, y, weight, weight_scale, bias, *rest: _backward_fake(g, x, weight, *rest),
)
registry.define(
    "ia3_input_backward(Tensor g, Tensor x, Tensor weight, Tensor? weight_scale, Tensor l, bool need_dx, bool need_dl) "
    "-> (Tensor dx, Tensor dl)",
    _input_backward,
    fake=lambda g, x, weight, weight_scale, *rest: _backward_fake(g, x, weight, *rest),
)


class Watch:
    """Tells whether a tensor that was handed out has been changed in place since, without holding its memory."""

    def __init__(self, y: Tensor) -> None:
        # Without elements of its own; what it shares with y is the version, which every change in place raises.
        self.shadow = y.detach()
        self.shadow.data = y.new_empty(0)
        self.version = y._version

    def changed(self) -> bool:
        """Whether it has been."""
        return self.shadow._version != self.version


def _native_pair(x: Tensor, weight: Tensor, l: Tensor, out_dtype: torch.dtype) -> tuple[str, str] | None:
    """The routes of forward and backward where both are kernels of the CPU and nobody has to see the ops, else None."""
    if registry.watched(x, weight, l) or native.device_kind(x) != "cpu":
        return None
    return routes.native_pair(x, weight, out_dtype)


def _flat(l: Tensor) -> Tensor:
    """l as the kernels of the CPU read it."""
    return l.flatten() if l.dtype == torch.float32 else l.flatten().to(torch.float32)


class ScaledOutput(registry.Function):
    """A frozen linear layer whose output, with its bias, is multiplied by l, over any leading dimensions of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, l: Tensor, owner: FrozenOwner, out_dtype: torch.dtype, with_bias: bool = True
    ) -> Tensor:
        """y (..., N) for x (..., K) and l of N elements in any shape.

        ``owner.operands()`` is read here and again in backward, never kept. Without ``with_bias`` the owner's bias is
        left out of y.
        """
        weight, weight_scale, bias = owner.operands()
        if not with_bias:
            bias = None
        pair = _native_pair(x, weight, l, out_dtype)
        if pair is not None:
            y = _output_forward_fused(x, weight, weight_scale, bias, _flat(l), out_dtype, pair[0] == "skinny")
        else:
            form = torch.ops.pyadapt.ia3_output_forward if registry.watched(x, weight, l) else _output_forward
            y = like_rows(form(as_rows(x), weight, weight_scale, bias, l.flatten(), out_dtype), x)
        watch = None
        if not l.requires_grad:
            ctx.save_for_backward(None, l, None)
        elif pair is None and registry.watched(x, weight, l):
            ctx.save_for_backward(x, l, y)
        else:
            # The layer after this one may change y in place: an alias with a version of its own is saved, so that
            # backward can find out and go another way, where torch would raise.
            watch = Watch(y)
            ctx.save_for_backward(x, l, y.data)
        ctx.saved = owner, with_bias, x.dtype, watch, pair
        return y

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and l."""
        x, l, y = ctx.saved_tensors
        owner, with_bias, x_dtype, watch, pair = ctx.saved
        weight, weight_scale, bias = owner.operands()
        if not with_bias:
            bias = None
        need_dx, need_dl = ctx.needs_input_grad[:2]
        if watch is not None and watch.changed():
            y = None
        if pair is not None and (y is not None or not need_dl) and not registry.watched(g, weight):
            dx, dl = None, None
            factors = _flat(l)
            if need_dx:
                dx = kernels.cpu.linear_dx(g, weight, _both(weight_scale, factors), x_dtype)
            if need_dl:
                dl, is_small = kernels.cpu.column_quotients(g, y, factors, least_factor(y.dtype))
                if is_small:
                    _correct_(dl, as_rows(g), as_rows(x), weight, weight_scale, bias, factors, y.dtype)
                dl = dl.view(l.shape) if l.dtype == torch.float32 else dl.view(l.shape).to(l.dtype)
            return dx, dl, None, None, None
        x = g.new_empty((0, 0), dtype=x_dtype) if x is None else as_rows(x)
        y = None if y is None else as_rows(y)
        form = torch.ops.pyadapt.ia3_output_backward if registry.watched(g, weight, l) else _output_backward
        dx, dl = form(as_rows(g), x, y, weight, weight_scale, bias, l.flatten(), need_dx, need_dl)
        return like_rows(dx, g) if need_dx else None, dl.view(l.shape) if need_dl else None, None, None, None


class ScaledInput(registry.Function):
    """A frozen linear layer whose input is multiplied by l, over any leading dimensions of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, l: Tensor, owner: FrozenOwner, out_dtype: torch.dtype, with_bias: bool = True
    ) -> Tensor:
        """y (..., N) for x (..., K) and l of K elements in any shape; the rest as in ``ScaledOutput``."""
        weight, weight_scale, bias = owner.operands()
        if not with_bias:
            bias = None
        pair = _native_pair(x, weight, l, out_dtype)
        ctx.saved = owner, x.dtype, pair
        ctx.save_for_backward(x if l.requires_grad else None, l)
        if pair is not None:
            skinny = pair[0] == "skinny"
            return kernels.cpu.scaled_linear_forward(x, _flat(l), weight, weight_scale, bias, out_dtype, skinny)
        form = torch.ops.pyadapt.ia3_input_forward if registry.watched(x, weight, l) else _input_forward
        return like_rows(form(as_rows(x), weight, weight_scale, bias, l.flatten(), out_dtype), x)

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and l."""
        x, l = ctx.saved_tensors
        owner, x_dtype, pair = ctx.saved
        weight, weight_scale, _ = owner.operands()
        need_dx, need_dl = ctx.needs_input_grad[:2]
        if pair is not None and need_dl and not registry.watched(g, weight):
            dx = kernels.cpu.linear_dx(g, weight, weight_scale, x_dtype)
            dl = kernels.cpu.scale_columns_dot(dx, x, _flat(l), dx if need_dx else None)
            dl = dl.view(l.shape) if l.dtype == torch.float32 else dl.view(l.shape).to(l.dtype)
            return dx if need_dx else None, dl, None, None, None
        x = g.new_empty((0, 0), dtype=x_dtype) if x is None else as_rows(x)
        form = torch.ops.pyadapt.ia3_input_backward if registry.watched(g, weight, l) else _input_backward
        dx, dl = form(as_rows(g), x, weight, weight_scale, l.flatten(), need_dx, need_dl)
        return like_rows(dx, g) if need_dx else None, dl.view(l.shape) if need_dl else None, None, None, None
