"""Which dtype a layer computes in and stores."""

from __future__ import annotations

import torch
from torch import Tensor


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's output for input `x`: autocast's where it is on, else that of `x`.

    The input itself is not cast: the kernels read it as it was given.

    Raises:
        TypeError: `x` is not floating, so that an output of its dtype would be truncated.
    """
    if not x.is_floating_point():
        raise TypeError(f"a linear layer's input has dtype {x.dtype}; a floating dtype is needed: x.float()")
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def adapter_dtype(weight: torch.dtype) -> torch.dtype:
    """The dtype of new adapter weights over a base of dtype `weight`: fp32, except over fp64."""
    return torch.float64 if weight == torch.float64 else torch.float32
