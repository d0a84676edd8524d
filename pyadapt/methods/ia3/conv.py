"""IA3 on a convolution: a factor for each output channel, l (1, out, 1, ...), or each input channel, (1, in, ...)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...base import BaseWeight
from ...layer import AdaptedLayer
from ...ops import registry
from ...ops.ia3_channels import ScaledChannels
from .config import IA3Config
from .unit import Factors, IA3Unit


class ConvUnit(IA3Unit):
    """IA3 on y = W * x + b in one, two or three dimensions.

    Attributes:
        groups: of the layer.
    """

    def __init__(
        self, config: IA3Config, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        self.groups: int = layer.groups

    @classmethod
    def shapes(cls, config: IA3Config, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        channels = layer.in_channels if config.is_feedforward(path) else layer.out_channels
        return {"ia3_l": (1, channels, *(1 for _ in layer.kernel_size))}

    def scaled(self, x: Tensor, owner: AdaptedLayer, factors: Factors) -> Tensor:
        """See `IA3Unit.scaled`; x (batch, in, *size), or without the batch."""
        of_input, of_output = factors
        if of_input is not None:
            x = (x * of_input.flatten(0, 1)).to(x.dtype)
        if of_output is None:
            return owner.frozen(x)
        y = owner.frozen(x)
        if registry.watched(y, of_output):
            # A compiler decides by itself what to save.
            return (y * of_output.flatten(0, 1)).to(y.dtype)
        return ScaledChannels.apply(y, of_output, x, owner)

    def fold_input(self, matrix: Tensor, l: Tensor) -> Tensor:
        """See `IA3Unit.fold_input`: an output channel reads the input channels of its group."""
        channels = l.numel() // self.groups
        by_group = matrix.view(self.groups, matrix.shape[0] // self.groups, channels, -1)
        return (by_group * l.view(self.groups, 1, channels, 1)).view_as(matrix)
