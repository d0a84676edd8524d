"""The native kernels as functions of tensors, one module a device: ``cpu``, ``cuda``.

Both have the same functions with the same arguments, so that a caller asks ``of(x)`` and never learns which it got.
Outputs are allocated here; everything is checked on the other side, before memory is touched.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from pyadapt import native

from . import cpu, cuda

__all__ = ["cpu", "cuda", "of"]


def of(tensor: Tensor) -> ModuleType:
    """The kernels that work on a tensor where it is."""
    return cpu if native.device_kind(tensor) == "cpu" else cuda
