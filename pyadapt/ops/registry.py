"""Registers the ops of the ``torch.library`` namespace ``pyadapt``, each in one call.

An op has one implementation for every device: it asks the route table (``routes.py``) which of its forms serves, and
the table sends a device without kernels to plain torch. ``fake`` gives shapes and dtypes for tracing. Gradients are not
registered: the ``torch.autograd.Function`` beside the op has them.

torch's dispatcher costs as much as a small layer's arithmetic. A ``Function`` therefore calls the implementation itself
while nobody looks on: no tracing, no dispatch mode, no transform, plain tensors (``watched``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C import _is_torch_function_mode_enabled as _has_function_mode
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

_PLAIN = (Tensor, nn.Parameter)

# The library object owns the registrations: they live as long as this module.
_LIBRARY = torch.library.Library("pyadapt", "DEF")


def define(schema: str, implementation: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
    """Define one op by its schema, e.g. ``"scale(Tensor x) -> Tensor"``."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyadapt::{name}", fake, lib=_LIBRARY)


def watched(x: Tensor, *weights: Tensor) -> bool:
    """Whether something has to see an op on these tensors as an op, and so it must go through torch's dispatcher.

    That is a compiler or tracer at work, a dispatch or function mode, a functional transform, a tensor of another
    class, or an x whose values are not what its memory says.
    """
    if (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _has_function_mode()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or type(x) not in _PLAIN
        or x.is_neg()
        or is_functorch_wrapped_tensor(x)
    ):
        return True
    for weight in weights:  # noqa: SIM110 - any() would cost a generator
        if type(weight) not in _PLAIN:
            return True
    return False


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable`` at no cost where no graph of the backward is recorded, which is nearly always."""
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor) -> Any:
        return (guarded if is_grad_enabled() else backward)(ctx, *gradients)

    return run


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` with less on the way from ``apply`` to ``forward``."""

    _apply: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        below: Any = super(torch.autograd.Function, cls)
        cls._apply = below.apply

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As ever. What torch wraps around it serves functional transforms, and is left out where there are none."""
        if _are_functorch_transforms_active():
            wrapped: Any = super()
            return wrapped.apply(*args)
        return cls._apply(*args)
