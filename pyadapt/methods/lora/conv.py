"""LoRA on a convolution: one of the layer's geometry down to r channels, then one of kernel 1 up to all of them.

    y = W * x + b + s (B * (A * drop(x)) + b_B),   A (r, in, *kernel), B (out, r / groups, 1, ...)

A sees every input channel, also where the layer has groups; B has the layer's groups. Stride, padding, dilation and
padding mode are those of the layer (PEFT's A loses the last two).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import low_rank
from ...base import BaseWeight
from ...layer import AdaptedLayer
from .config import LoraConfig
from .unit import LoraUnit, adapts


@adapts("conv")
class ConvUnit(LoraUnit):
    """LoRA on y = W * x + b in one, two or three dimensions.

    Attributes:
        groups: of the layer, and so of B.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        self.groups: int = layer.groups

    @classmethod
    def shapes(cls, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`.

        Raises:
            ValueError: the rank cannot be divided among the layer's groups.
        """
        r, kernel = config.rank_of(path), layer.kernel_size
        if r % layer.groups:
            raise ValueError(
                f"r={r} cannot be divided among the {layer.groups} groups of this convolution: choose a multiple of "
                f"{layer.groups} (rank_pattern gives this layer its own), or name the layer in exclude_modules"
            )
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (r, layer.in_channels, *kernel),
            "lora_B": (layer.out_channels, r // layer.groups, *(1 for _ in kernel)),
        }
        return {**shapes, "lora_bias": (layer.out_channels,)} if config.lora_bias else shapes

    def parameters_of_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """See `LoraUnit.parameters_of_factors`."""
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`; x (batch, in, *size), or without the batch."""
        y = owner.frozen(x) if y is None else y
        return y + self.term(x, owner).to(y.dtype)

    def term(self, x: Tensor, owner: AdaptedLayer) -> Tensor:
        """What the adapter adds to the layer's output, in the dtype of A."""
        p = self.dropout if self.training else 0.0
        return self.scaling * low_rank.conv(x, self.lora_A, self.lora_B, owner, bias=self.lora_bias, p=p)

    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`.

        Raises:
            ValueError: the layer has groups: the adapter's term reads all input channels, which its weight has not.
        """
        if self.groups > 1:
            raise ValueError(
                f"LoRA on a convolution with {self.groups} groups cannot be merged: its term reads every input channel "
                "and the layer's weight those of one group; keep the adapter unmerged, or leave the layer out"
            )
        return super().fold(matrix, bias)
