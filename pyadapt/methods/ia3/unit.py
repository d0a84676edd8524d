"""The factors of an IA3 adapter on one layer, and what it computes on a linear layer.

    y = (x W' + b) * l,   l (N, 1)          a feed-forward layer:   y = (x * l) W' + b,   l (1, K)

The factors of several adapters are multiplied. Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better
and Cheaper than In-Context Learning", 2022.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...base import BaseWeight
from ...dtypes import output_dtype, product_input
from ...layer import AdaptedLayer
from ...lookup import parameter
from ...method import AdapterUnit, product_route
from ...ops.ia3 import ScaledInput, ScaledOutput
from .config import IA3Config


class Factors(NamedTuple):
    """What a layer's input and output are multiplied by, each None for ones; in the shapes of the adapters' weights."""

    of_input: Tensor | None = None
    of_output: Tensor | None = None


class IA3Unit(AdapterUnit):
    """The factors l.

    Attributes:
        path: of the layer.
        feedforward: whether they are of the layer's input.
    """

    file_keys: ClassVar[dict[str, str]] = {"ia3_l": "ia3_l"}
    ia3_l: nn.Parameter

    def __init__(
        self, config: IA3Config, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        self.path, self.feedforward = path, config.is_feedforward(path)

    def initialize(self, config: IA3Config, path: str, base: type[BaseWeight], layer: Any) -> None:
        """See `AdapterUnit.initialize`."""
        with torch.no_grad():
            self.ia3_l.fill_(1.0) if config.init_ia3_weights else self.ia3_l.normal_()

    @abc.abstractmethod
    def scaled(self, x: Tensor, owner: AdaptedLayer, factors: Factors) -> Tensor:
        """The layer's output for input x, with the factors of all adapters."""

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Any = None, *, others_follow: bool = False) -> Any:
        """See `AdapterUnit.forward`; with several adapters each hands on the factors so far, and the last one runs.

        Args:
            x: the layer's input; None where others follow.
            owner: the adapted layer.
            y: the `Factors` of the adapters before this one, in the place of an output, which they have not made.
            others_follow: whether to give the factors and not the output.
        """
        l = parameter(self, "ia3_l")
        if y is None and not others_follow:
            return self.scaled(x, owner, Factors(l, None) if self.feedforward else Factors(None, l))
        of_input, of_output = Factors() if y is None else y
        if self.feedforward:
            of_input = _times(of_input, l)
        else:
            of_output = _times(of_output, l)
        factors = Factors(of_input, of_output)
        return factors if others_follow else self.scaled(x, owner, factors)

    @staticmethod
    def run(units: Sequence[nn.Module], owner: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        """See `AdapterUnit.run`; the factors of all units are joined before the layer runs."""
        factors = None
        for unit in units[:-1]:
            factors = unit(None, owner, factors, others_follow=True)
        return units[-1](*args, owner, factors, **kwargs)

    @classmethod
    def check_together(cls, units: Mapping[str, AdapterUnit]) -> None:
        """See `AdapterUnit.check_together`: in which order a sum and a product come is not defined."""
        others = [name for name, unit in units.items() if not isinstance(unit, IA3Unit)]
        if others:
            own = [name for name in units if name not in others]
            raise ValueError(
                f"{', '.join(own)} (IA3) multiplies what the layer makes, and {', '.join(others)} adds to it or makes "
                "it anew; which comes first is not defined"
            )

    def can_take(self, values: Mapping[str, Tensor], config: IA3Config) -> bool:
        """See `AdapterUnit.can_take`; a convolution's factors may have the same shape on either side."""
        return super().can_take(values, config) and config.is_feedforward(self.path) == self.feedforward

    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`."""
        l = self.ia3_l.detach().to(matrix.dtype).flatten()
        if self.feedforward:
            return self.fold_input(matrix, l), bias
        matrix *= l[:, None]
        return matrix, None if bias is None else bias * l

    def fold_input(self, matrix: Tensor, l: Tensor) -> Tensor:
        """The weight with the factors of the input in it; `matrix` may be changed in place."""
        matrix *= l
        return matrix

    def extra_repr(self) -> str:
        """Which side is scaled, for `print(model)`."""
        return f"{self.ia3_l.numel()} factors of the {'input' if self.feedforward else 'output'}"


def _times(factors: Tensor | None, l: Tensor) -> Tensor:
    # A tensor of its own in either case: a sharding engine takes l back when its unit has run.
    return l.clone() if factors is None else factors * l


class LinearUnit(IA3Unit):
    """IA3 on y = x W' + b: the factors in the epilogue of the product, or in the pass that reads x."""

    @classmethod
    def shapes(cls, config: IA3Config, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        out_features, in_features = base.shape(layer)
        return {"ia3_l": (1, in_features) if config.is_feedforward(path) else (out_features, 1)}

    @classmethod
    def route(cls, config: IA3Config, path: str, base: type[BaseWeight], layer: Any, tokens: int) -> str:
        """See `AdapterUnit.route`."""
        return product_route(base, layer, tokens)

    def scaled(self, x: Tensor, owner: AdaptedLayer, factors: Factors) -> Tensor:
        """See `IA3Unit.scaled`; x (..., K)."""
        of_input, of_output = factors
        x = product_input(x)
        dtype = output_dtype(x)
        # A bias that is trained is added where autograd sees it.
        trained = owner.live_bias is not None
        if of_output is None:
            y = ScaledInput.apply(x, of_input, owner, dtype, not trained)
            return y + cast(Tensor, owner.bias).to(y.dtype) if trained else y
        if of_input is not None:
            x = (x * of_input.flatten()).to(x.dtype)
        y = ScaledOutput.apply(x, of_output, owner, dtype, not trained)
        return y + (cast(Tensor, owner.bias) * of_output.flatten()).to(y.dtype) if trained else y
