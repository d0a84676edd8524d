"""LoKr on a linear layer: the frozen product, and the term in one pass over x and y."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...base import BaseWeight
from ...dtypes import output_dtype, product_input
from ...layer import AdaptedLayer
from ...method import product_route
from ...ops.lokr import LARGEST_FACTOR, LokrLinear
from .lokr import LoKr, LoKrConfig, LoKrUnit, sizes


class LinearUnit(LoKrUnit):
    """LoKr on y = x W' + b."""

    @classmethod
    def shapes(cls, config: LoKrConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        return cls.shapes_of(sizes(config, path, *base.shape(layer)), config.rank_of(path))

    @classmethod
    def route(cls, config: LoKrConfig, path: str, base: type[BaseWeight], layer: Any, tokens: int) -> str:
        """See `AdapterUnit.route`: of the frozen product, and of the term."""
        frozen, device = product_route(base, layer, tokens), next(iter(base.stored(layer).values())).device.type
        cut, r = sizes(config, path, *base.shape(layer)), config.rank_of(path)
        largest = cut.b * cut.d if cut.is_w2_full else r * max(cut.b, cut.d)
        is_native = device == "cpu" and largest <= LARGEST_FACTOR and frozen != "reference"
        return f"{frozen}, kronecker" if is_native else f"{frozen}, kronecker in torch"

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`."""
        w1, down, up = self.factors()
        x = product_input(x)
        dropped = self.output_factors(x, w1.shape[0] * (down if up is None else up).shape[0])
        if y is not None:
            return y + LokrLinear.apply(x, w1, down, up, dropped, None, self.scaling, y.dtype)
        # A bias that is trained is added where autograd sees it.
        trained: Any = owner.bias if owner.live_bias is not None else None
        y = LokrLinear.apply(x, w1, down, up, dropped, owner, self.scaling, output_dtype(x), trained is None)
        return y if trained is None else y + trained.to(y.dtype)


LoKr.units["linear"] = LinearUnit
