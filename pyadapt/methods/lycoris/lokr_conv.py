"""LoKr on a convolution: one with w2 on each of the c parts of x, then a product with w1 over the parts.

    x (batch, c d, *size) as (batch c, d, *size):   U = down * x   (batch, c, h, *size),   V = w1 U,   y += s up V

with the stride, padding, dilation and padding mode of the layer (PEFT loses the last). With groups, where a part of x
belongs to one group alone, and where it would cost more, the term is one convolution with dW.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import low_rank
from ...base import BaseWeight
from ...layer import AdaptedLayer
from ...lookup import parameter
from .lokr import LoKr, LoKrConfig, LoKrUnit, Sizes, sizes

FACTORED, DENSE = "kronecker, convolutions", "convolution with dW"


def is_factored(cut: Sizes, r: int, places: int, groups: int) -> bool:
    """Whether the convolution with w2 and the product with w1 cost less than one with dW."""
    h = cut.b if cut.is_w2_full else r
    up = 0 if cut.is_w2_full else cut.a * cut.b * h
    return groups == 1 and cut.c * cut.d * h * places + cut.a * cut.c * h + up < cut.a * cut.b * cut.c * cut.d * places


class ConvUnit(LoKrUnit):
    """LoKr on y = W * x + b in one, two or three dimensions.

    Attributes:
        kernel: the layer's.
        factored: whether dW is never formed.
    """

    lokr_t2: nn.Parameter

    def __init__(
        self, config: LoKrConfig, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        self.kernel: tuple[int, ...] = tuple(layer.kernel_size)
        self.is_effective = "lokr_t2" in self.shapes(config, path, base, layer)
        self.factored = self.route(config, path, base, layer, 1) == FACTORED

    @staticmethod
    def sizes(config: LoKrConfig, path: str, layer: Any) -> Sizes:
        """How the layer's weight is cut."""
        return sizes(config, path, layer.out_channels, layer.in_channels // layer.groups)

    @classmethod
    def shapes(cls, config: LoKrConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        cut, r, kernel = cls.sizes(config, path, layer), config.rank_of(path), tuple(layer.kernel_size)
        shapes = cls.shapes_of(cut, r, kernel)
        effective = config.use_effective_conv2d and len(kernel) < 3 and math.prod(kernel) > 1
        if cut.is_w2_full or not effective:
            return shapes
        # A file has a second dimension of one for Conv1d.
        return {**shapes, "lokr_w2_a": (r, cut.b), "lokr_w2_b": (r, cut.d), "lokr_t2": (r, r, *kernel, 1)[:4]}

    @classmethod
    def route(cls, config: LoKrConfig, path: str, base: type[BaseWeight], layer: Any, tokens: int) -> str:
        """See `AdapterUnit.route`."""
        cut, places = cls.sizes(config, path, layer), math.prod(layer.kernel_size)
        return FACTORED if is_factored(cut, config.rank_of(path), places, layer.groups) else DENSE

    def right(self) -> tuple[Tensor, Tensor | None]:
        """See `LoKrUnit.right`."""
        down, up = super().right()
        if up is None:
            return down, up
        if not self.is_effective:
            return down.view(down.shape[0], -1, *self.kernel), up
        with torch.autocast(down.device.type, enabled=False):
            down = torch.einsum("ijxy,jk->ikxy", parameter(self, "lokr_t2"), down)
        return down.reshape(*down.shape[:2], *self.kernel), up.t()

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`; x (batch, in, *size), or without the batch."""
        y = owner.frozen(x) if y is None else y
        term = self.term(x if x.dim() == y.dim() == len(self.kernel) + 2 else x.unsqueeze(0), owner)
        return y + term.view(y.shape).to(y.dtype)

    def term(self, x: Tensor, owner: Any) -> Tensor:
        """What the adapter adds to the layer's output, in the dtype of its weights; x (batch, in, *size)."""
        w1, down, up = self.factors()
        run = factored if self.factored else with_delta
        if torch.is_grad_enabled() and (not self.factored or x.dtype != w1.dtype):
            # dW and a cast x are made again in backward, not kept.
            term = checkpoint(run, x, w1, down, up, owner, use_reentrant=False, preserve_rng_state=False)
        else:
            term = run(x, w1, down, up, owner)
        dropped = self.output_factors(x, term.shape[1])
        if dropped is None:
            return self.scaling * term
        return term * (self.scaling * dropped.to(term.dtype)).view(-1, *(1 for _ in self.kernel))


def factored(x: Tensor, w1: Tensor, down: Tensor, up: Tensor | None, owner: Any) -> Tensor:
    """The term without its scaling, by a convolution with each factor: (batch, a b, *size)."""
    with torch.autocast(x.device.type, enabled=False):
        parts = x.to(down.dtype).reshape(-1, down.shape[1], *x.shape[2:])
        U = low_rank.conv_like(parts, down, owner)
        V = w1 @ U.reshape(x.shape[0], w1.shape[1], -1)
        V = V.view(-1, *U.shape[1:])
        if up is not None:
            V = low_rank.CONVOLUTIONS[down.dim()](V, up.reshape(*up.shape, *(1 for _ in down.shape[2:])))
        return V.reshape(x.shape[0], -1, *V.shape[2:])


def with_delta(x: Tensor, w1: Tensor, down: Tensor, up: Tensor | None, owner: Any) -> Tensor:
    """The term without its scaling, by one convolution with dW: (batch, a b, *size)."""
    with torch.autocast(x.device.type, enabled=False):
        w2 = down.flatten(1) if up is None else up @ down.flatten(1)
        kernel = (owner.out_channels, owner.in_channels // owner.groups, *owner.kernel_size)
        return low_rank.conv_like(x.to(w1.dtype), torch.kron(w1, w2).view(kernel), owner, owner.groups)


LoKr.units["conv"] = ConvUnit
