"""A part of a model with many weights inside, as a host of units."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base import Host


class Part(Host):
    """A module that stands where its first weight is, and has the dtype of its first floating one."""

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        """See `Host.dtype`."""
        return next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)

    @staticmethod
    def stored(layer: Any) -> dict[str, nn.Parameter]:
        """See `Host.stored`: the first of the parameters inside."""
        return dict([next(iter(layer.named_parameters()))])
