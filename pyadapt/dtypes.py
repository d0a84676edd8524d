"""Which dtype a layer computes in and stores."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's output for input `x`: autocast's where it is on, else that of `x`.

    The input itself is not cast: the kernels read it as it was given.

    Raises:
        TypeError: `x` is not floating, so that an output of its dtype would be truncated.
    """
    dtype = x.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"a linear layer's input has dtype {dtype}; a floating dtype is needed: x.float()")
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def product_input(x: Tensor) -> Tensor:
    """`x` as a linear layer should get it: on a GPU in autocast's dtype where that is on and x is fp32, else x itself.

    The kernels of a GPU take 16-bit activations, as autocast's own products do. Those of the CPU read fp32 as it is.
    """
    if x.dtype != torch.float32 or native.device_kind(x) != "cuda" or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


# What `adapter_dtype` of a configuration may say, beside None for the default.
ADAPTER_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LIKE_BASE = "base"


def adapter_dtype(weight: torch.dtype, wanted: str | None = None) -> torch.dtype:
    """The dtype of new adapter weights over a base of dtype `weight`.

    By default fp32, except over fp64; `wanted` is a name in `ADAPTER_DTYPES`, or `LIKE_BASE` for that of the weight.
    """
    if wanted == LIKE_BASE:
        return weight
    if wanted is not None:
        return ADAPTER_DTYPES[wanted]
    return torch.float64 if weight == torch.float64 else torch.float32
