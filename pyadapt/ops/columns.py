"""Passes over the columns of activations: scaled, and the sums of products, in one reading. Native on the CPU only.

Shapes: a and b (M, N), scale and shift (N,) in the dtype that products are summed in.
"""

from __future__ import annotations

from torch import Tensor

from pyadapt import native

from . import kernels, routes
from .linear import compute_dtype


def _on_cpu(*tensors: Tensor) -> bool:
    """Whether the native passes take these; on other devices plain torch serves."""
    return native.device_kind(tensors[0]) == "cpu" and routes.native_serves(tensors[0], *(t.dtype for t in tensors))


def scale_columns_(a: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """a = a scale + shift, in place: a (M, N), the others (N,)."""
    if _on_cpu(a):
        return kernels.cpu.scale_columns(a, scale, shift, out=a)
    wide = a.to(scale.dtype) * scale
    return a.copy_(wide if shift is None else wide + shift)


def scaled_columns(a: Tensor, scale: Tensor) -> Tensor:
    """a scale, rounded once to a's dtype."""
    return kernels.cpu.scale_columns(a, scale) if _on_cpu(a) else (a.to(scale.dtype) * scale).to(a.dtype)


def column_dots(a: Tensor, b: Tensor) -> Tensor:
    """The sum over m of a[m, n] b[m, n], (N,) in the dtype that products are summed in."""
    if _on_cpu(a, b):
        return kernels.cpu.scale_columns_dot(a, b)
    dtype = compute_dtype(a)
    return (a.to(dtype) * b.to(dtype)).sum(0)


def scaled_with_dots(a: Tensor, b: Tensor, scale: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """``scaled_columns(a, scale)`` and ``column_dots(a, b)`` in one pass, the first in the place of a if asked for."""
    if _on_cpu(a, b):
        out = a if in_place else a.new_empty(a.shape)
        return out, kernels.cpu.scale_columns_dot(a, b, scale, out)
    dots = column_dots(a, b)
    return (scale_columns_(a, scale) if in_place else scaled_columns(a, scale)), dots
