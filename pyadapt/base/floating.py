"""What the kinds have in common whose layers hold a weight in a floating dtype, as their class made it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .kind import BaseWeight


class Floating(BaseWeight):
    """A `weight` that a merge writes in place."""

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        """See `BaseWeight.dtype`."""
        return layer.weight.dtype

    @classmethod
    def matrix(cls, layer: Any) -> Tensor:
        """See `BaseWeight.matrix`."""
        weight = cls.operands(layer).weight.detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    @classmethod
    def assign(cls, layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.assign`; in place, so that tied weights stay tied."""
        with torch.no_grad():
            layer.weight.copy_(cls.plain(layer, matrix)["weight"])

    @classmethod
    def make_dense(cls, layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.make_dense`."""
        cls.assign(layer, matrix)

    @staticmethod
    def stored(layer: Any) -> dict[str, nn.Parameter]:
        """See `BaseWeight.stored`."""
        return {"weight": layer.weight}
