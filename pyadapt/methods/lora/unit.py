"""The weights of a LoRA adapter on one layer, and its mathematics on a linear layer.

    y = x W' + b + s (drop(x) A' B' + b_B),   A (r, K), B (N, r), s = alpha / r   (rsLoRA: alpha / sqrt(r))

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; rsLoRA: Kalajdzievski, 2023.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import low_rank
from ...base import BaseWeight
from ...dtypes import output_dtype, product_input
from ...layer import AdaptedLayer
from ...lookup import parameter
from ...low_rank import LowRank
from ...method import AdapterUnit, product_route
from ...ops.lora import LoraLinear
from ...seed import draw_seed
from .config import LoraConfig
from .inits import initialize, start_moves

# (form of a layer, whether DoRA) -> the unit that serves it. A file of this package adds its own with `@adapts`.
UNITS: dict[tuple[str, bool], type[LoraUnit]] = {}

UnitT = TypeVar("UnitT", bound="type[LoraUnit]")


def adapts(form: str, *, dora: bool = False) -> Callable[[UnitT], UnitT]:
    """Class decorator: the unit for layers of one form (see `BaseWeight.form`)."""

    def add(unit: UnitT) -> UnitT:
        UNITS[form, dora] = unit
        return unit

    return add


class LoraUnit(AdapterUnit):
    """A, B and, if asked for, a bias of B.

    Attributes:
        scaling: the factor s.
        dropout: the probability p of drop().
    """

    file_keys: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
    }
    # None where the configuration has no `lora_bias`.
    lora_bias: nn.Parameter | None
    # The A and B that the adapter began with where they are not zero together (PiSSA, OLoRA): what the layer starts
    # from is W - s B0 A0. W itself is never changed; the pair is run as -B0 A0 beside BA.
    start_A: Tensor | None
    start_B: Tensor | None
    # Set by an initialisation that changes the layer's own weight (LoftQ), and called once.
    change_layer: Callable[[], None] | None = None

    def __init__(
        self, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        if not config.lora_bias:
            self.register_parameter("lora_bias", None)
        self.scaling = config.scaling_of(path)
        self.dropout = config.lora_dropout
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    @classmethod
    def needs_start(cls, config: LoraConfig) -> bool:
        """See `AdapterUnit.needs_start`."""
        return start_moves(config)

    def initialize(self, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> None:
        """See `AdapterUnit.initialize`."""
        initialize(self, config, base, layer)

    def start_from(self, values: Mapping[str, Tensor], layer: Any) -> None:
        """See `AdapterUnit.start_from`."""
        super().start_from(values, layer)
        # A B that is not zero at first answers for what the layer has lost (LoftQ); EVA knows A alone.
        self.fits_quantization = layer.base.quantized and "lora_B" in values

    def settle(self) -> None:
        """See `AdapterUnit.settle`."""
        if self.change_layer is not None:
            self.change_layer()
            self.change_layer = None

    @abc.abstractmethod
    def parameters_of_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B, in the shapes they are stored in."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, K) and B (N, r) for which s B A is what is added to `BaseWeight.matrix`."""
        A, B = self.parameters_of_factors()
        return A.flatten(1), B.flatten(1)

    def with_start(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, with those of the start, if any, beside them: B negated, so that their product is taken off."""
        if self.start_A is None or self.start_B is None:
            return A, B
        return torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], dim=1)

    def delta(self) -> Tensor:
        """s B A, less what it was at the start where that is not zero; fp32, or fp64 for an fp64 adapter."""
        A, B = self.factors()
        wide = torch.promote_types(A.dtype, torch.float32)
        delta = B.detach().to(wide) @ A.detach().to(wide)
        if self.start_A is not None and self.start_B is not None:
            delta -= self.start_B.to(wide) @ self.start_A.to(wide)
        return self.scaling * delta

    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`."""
        matrix += self.delta().view_as(matrix)
        if self.lora_bias is not None:
            if bias is None:
                raise ValueError(
                    "lora_bias=True has trained a bias, and the layer has none that could take it over: "
                    "save the adapter and load it beside the model in place of merging"
                )
            bias = bias + self.scaling * self.lora_bias.detach().to(bias.dtype)
        return matrix, bias

    def can_take(self, values: Mapping[str, Tensor], config: LoraConfig) -> bool:
        """See `AdapterUnit.can_take`; lower ranks are padded with zeros."""
        return self.start_A is None and not self.needs_start(config) and self.can_take_padded(values)

    def take(self, values: Mapping[str, Tensor], config: LoraConfig, path: str) -> None:
        """See `AdapterUnit.take`; the ratio of the scalings goes into B and its bias."""
        self.take_padded(values)
        for scaled in (self.parameters_of_factors()[1], self.lora_bias):
            if scaled is not None:
                scaled.mul_(config.scaling_of(path) / self.scaling)

    def extra_repr(self) -> str:
        """Rank, scaling and dropout, for `print(model)`."""
        return f"r={self.parameters_of_factors()[0].shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


@adapts("linear")
class LinearUnit(LoraUnit):
    """LoRA on y = x W' + b: one kernel for the frozen product and the adapter's term."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @classmethod
    def shapes(cls, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        r, (out_features, in_features) = config.rank_of(path), base.shape(layer)
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (r, in_features), "lora_B": (out_features, r)}
        return {**shapes, "lora_bias": (out_features,)} if config.lora_bias else shapes

    @classmethod
    def route(cls, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any, tokens: int) -> str:
        """See `AdapterUnit.route`."""
        return product_route(base, layer, tokens, config.rank_of(path))

    def parameters_of_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """See `LoraUnit.parameters_of_factors`."""
        return self.lora_A, self.lora_B

    def low_rank(self) -> LowRank | None:
        """See `AdapterUnit.low_rank`."""
        if type(self) is not LinearUnit or self.start_A is not None or parameter(self, "lora_bias") is not None:
            return None
        return LowRank(self.lora_A, self.lora_B, self.scaling, self.dropout if self.training else 0.0)

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None, with_bias: bool = True) -> Tensor:
        """See `AdapterUnit.forward`; without `with_bias` the layer's own bias is left out, where y is None."""
        own = self._parameters
        A = own.get("lora_A")
        # The usual case in as few steps as there are, for a tiny layer feels each; engines may have put A elsewhere.
        has_more = own.get("lora_bias", A) is not None or self._buffers["start_A"] is not None
        if A is None or has_more or y is not None or owner.live_bias is not None:
            return self._forward_with_all(x, owner, y, with_bias)
        x = product_input(x)
        p = self.dropout if self.training else 0.0
        seed = draw_seed(x) if p > 0 else None
        return LoraLinear.apply(x, A, own["lora_B"], owner, self.scaling, p, seed, output_dtype(x), with_bias)

    def _forward_with_all(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None, with_bias: bool) -> Tensor:
        p = self.dropout if self.training else 0.0
        # The start stands for a part of W, of which dropout takes nothing.
        start_apart = p > 0 and self.start_A is not None
        A, B = (self.lora_A, self.lora_B) if start_apart else self.with_start(self.lora_A, self.lora_B)
        # Before the kernel: torch.compile loses a scaling that it meets inside a Function and then outside.
        beside: list[Tensor] = []
        if start_apart:
            start = F.linear(F.linear(x.to(A.dtype), cast(Tensor, self.start_A)), cast(Tensor, self.start_B))
            beside.append(-self.scaling * start)
        if self.lora_bias is not None:
            beside.append(self.scaling * self.lora_bias)
        y = low_rank.linear(x, LowRank(A, B, self.scaling, p), owner, y, with_bias)
        for term in beside:
            y = y + term.to(y.dtype)
        return y
