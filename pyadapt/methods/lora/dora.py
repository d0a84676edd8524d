"""DoRA: the magnitude of each row of the weight is trained by itself, and LoRA moves its direction.

    y = c (x W' + s (drop(x) A' B' + b_B)) + b,   c[n] = m[n] / |W[n, :] + s (B A)[n, :]|

The magnitude m (N,) starts as the norm, so that the layer starts as LoRA alone would. The norm follows A and B but
takes no gradient (section 4.3 of the paper). Several adapters at work act one after another on what lies between c and
b, each with the norm of W and its own A and B, as in PEFT. Under dropout the frozen product is that of the whole x.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base import BaseWeight, base_of
from ...distributed.sharding import whole
from ...layer import AdaptedLayer
from ...method import AdapterUnit, Fold
from ...ops.dora import ScaleFeatures
from .config import LoraConfig
from .conv import ConvUnit
from .embedding import EmbeddingUnit
from .norms import NormCache
from .unit import LinearUnit, LoraUnit, adapts


class DoraUnit(LoraUnit):
    """The magnitude beside A and B; mixed into the LoRA unit of a form of layer."""

    file_keys: ClassVar[dict[str, str]] = {
        **LoraUnit.file_keys,
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    # Older files name the magnitude as a module's weight.
    file_aliases: ClassVar[dict[str, str]] = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}
    lora_magnitude_vector: nn.Parameter

    def __init__(
        self, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        self._cache = NormCache()

    @classmethod
    def shapes(cls, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        shapes = super().shapes(config, path, base, layer)
        return {**shapes, "lora_magnitude_vector": cls.magnitude_shape(base, layer)}

    @classmethod
    def check_together(cls, units: Mapping[str, AdapterUnit]) -> None:
        """See `AdapterUnit.check_together`: the norm is that of W + s B A, which has no other terms."""
        other = next((name for name, unit in units.items() if not isinstance(unit, LoraUnit)), None)
        if other is not None:
            dora = next(name for name, unit in units.items() if isinstance(unit, DoraUnit))
            raise ValueError(
                f"the norm of {dora!r}, a DoRA, is that of W + s B A, where {other!r}, which is no LoRA, has no place"
            )

    @classmethod
    def magnitude_shape(cls, base: type[BaseWeight], layer: Any) -> tuple[int, ...]:
        """Shape of m in a file: one value an output feature."""
        return (base.shape(layer)[0],)

    def initialize(self, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> None:
        """See `AdapterUnit.initialize`."""
        super().initialize(config, path, base, layer)
        self.start_magnitude(layer)
        change = self.change_layer
        if change is not None:

            def change_and_measure() -> None:
                change()
                self.start_magnitude(layer)

            self.change_layer = change_and_measure

    def start_from(self, values: Mapping[str, Tensor], layer: Any) -> None:
        """See `AdapterUnit.start_from`."""
        super().start_from(values, layer)
        self.start_magnitude(layer)

    def start_magnitude(self, layer: Any) -> None:
        """Make m the norm that `layer` has with A and B as they are, so that c is 1."""
        base = base_of(layer)
        assert base is not None
        with torch.no_grad(), whole(layer, [layer]):
            weight, weight_scale, _ = base.operands(layer)
            self.lora_magnitude_vector.view(-1).copy_(self.norm(weight, weight_scale))

    def norm(self, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
        """|W + s B A| by output feature, (N,), for a weight and its scale as in `Operands`."""
        A, B = self.with_start(*self.factors())
        with torch.no_grad():
            return torch.ops.pyadapt.row_norms(weight, weight_scale, A, B, self.scaling)

    def columns(self, owner: AdaptedLayer) -> Tensor:
        """c (N,) for the layer as it is now."""

        def norm() -> Tensor:
            weight, weight_scale, _ = owner.operands()
            return self.norm(weight, weight_scale)

        if self.training:
            self._cache.clear()
            return self._over(norm())
        start = (tensor for tensor in (self.start_A, self.start_B) if tensor is not None)
        sources = [*owner.base.stored(owner).values(), *self.parameters_of_factors(), *start]
        return self._over(self._cache.norms(sources, self.scaling, norm))

    def _over(self, norm: Tensor) -> Tensor:
        # A row that is zero has no direction to stretch: it stays zero, where 0 / 0 would be a NaN.
        return self.lora_magnitude_vector.view(-1).to(norm.dtype) / norm.masked_fill(norm == 0, torch.inf)

    def folding(self, matrix: Tensor, bias: Tensor | None) -> Fold:
        """See `AdapterUnit.folding`; the norm is that of the layer's own weight, whatever was folded in before."""
        with torch.no_grad():
            c = self._over(self.norm(matrix, None))

        def fold(matrix: Tensor, now: Tensor | None) -> tuple[Tensor, Tensor | None]:
            matrix, moved = super(DoraUnit, self).fold(matrix, now)
            if bias is not None and moved is not None and moved is not bias:
                # c stretches what this adapter and those before it have added to the layer's own bias.
                moved = bias + c * (moved - bias)
            return matrix.mul_(self.stretch(c)), moved

        return fold

    def stretch(self, c: Tensor) -> Tensor:
        """c in the shape that multiplies `BaseWeight.matrix`."""
        return c[:, None]

    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`."""
        return self.folding(matrix, bias)(matrix, bias)


@adapts("linear", dora=True)
class DoraLinearUnit(DoraUnit, LinearUnit):
    """DoRA on y = x W' + b: the kernel of LoRA, then c and b."""

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None, with_bias: bool = True) -> Tensor:
        """See `LinearUnit.forward`."""
        bias: Any = owner.bias
        # First, as torch.compile loses a scaling that it meets inside a Function and then outside.
        c = self.columns(owner)
        z = super().forward(x, owner, y if y is None else _without(bias, y), with_bias=False)
        return ScaleFeatures.apply(z, c, bias if with_bias else None)


@adapts("conv", dora=True)
class DoraConvUnit(DoraUnit, ConvUnit):
    """DoRA on y = W * x + b: the norm of an output channel is over all its inputs and places of the kernel."""

    @classmethod
    def shapes(cls, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`.

        Raises:
            ValueError: the layer has groups: LoRA's term reads all input channels, and is no change of its weight.
        """
        if layer.groups > 1:
            raise ValueError(
                f"use_dora: a convolution with {layer.groups} groups has no W + s B A to take the norm of; "
                "name the layer in exclude_modules"
            )
        return super().shapes(config, path, base, layer)

    @classmethod
    def magnitude_shape(cls, base: type[BaseWeight], layer: Any) -> tuple[int, ...]:
        """See `DoraUnit.magnitude_shape`; shaped as the layer's output."""
        return (1, layer.out_channels, *(1 for _ in layer.kernel_size))

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`; x (batch, in, *size), or without the batch."""
        layer: Any = owner
        bias, channels = layer.bias, 1 - self.lora_A.dim()
        z: Tensor = layer._conv_forward(x, layer.weight, None) if y is None else _without(bias, y, channels)
        z = z + self.term(x, owner).to(z.dtype)
        return ScaleFeatures.apply(z, self.columns(owner), bias, channels)


@adapts("embedding", dora=True)
class DoraEmbeddingUnit(DoraUnit, EmbeddingUnit):
    """DoRA on y = W[ids]: the output features are the columns of the table, (V, d), and so is what has a norm."""

    file_keys: ClassVar[dict[str, str]] = {
        **EmbeddingUnit.file_keys,
        "lora_magnitude_vector": "lora_magnitude_vector",
    }

    @classmethod
    def magnitude_shape(cls, base: type[BaseWeight], layer: Any) -> tuple[int, ...]:
        """See `DoraUnit.magnitude_shape`."""
        return (base.shape(layer)[1],)

    def norm(self, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
        """See `DoraUnit.norm`."""
        B, A = self.factors()
        with torch.no_grad():
            return torch.ops.pyadapt.row_norms(weight.t(), None, A.t(), B.t(), self.scaling)

    def stretch(self, c: Tensor) -> Tensor:
        """See `DoraUnit.stretch`."""
        return c

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`; x holds ids, of any shape."""
        y = owner.frozen(x) if y is None else y
        return ScaleFeatures.apply(y + self.term(x, owner).to(y.dtype), self.columns(owner), None)


def _without(bias: Tensor | None, y: Tensor, dim: int = -1) -> Tensor:
    """`y` less the layer's own bias along `dim`."""
    return y if bias is None else y - bias.to(y.dtype).view(-1, *[1] * (-1 - dim))
