"""A weight in a floating dtype: `torch.nn.Linear` (N, K), and transformers' `Conv1D`, which stores (K, N)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..lookup import parameter
from .floating import Floating
from .kind import Operands, check_at_hand, is_conv1d, register


@register
class Dense(Floating):
    """`weight` as the layer's class stores it."""

    name = "dense"

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `BaseWeight.accepts`."""
        is_linear = isinstance(layer, nn.Linear) or is_conv1d(layer)
        weight = getattr(layer, "weight", None)
        return is_linear and isinstance(weight, Tensor) and weight.is_floating_point()

    @staticmethod
    def shape(layer: Any) -> tuple[int, int]:
        """See `BaseWeight.shape`; the layer's own numbers, since a sharding engine may hold an empty weight."""
        if is_conv1d(layer):
            return layer.nf, layer.nx
        return layer.out_features, layer.in_features

    @staticmethod
    def operands(layer: Any) -> Operands:
        """See `BaseWeight.operands`."""
        check_at_hand(layer)
        weight: Tensor = parameter(layer, "weight")
        # Most are linear layers, of which the second question need not be asked.
        is_rows = isinstance(layer, nn.Linear) or not is_conv1d(layer)
        return Operands(weight if is_rows else weight.t(), None, parameter(layer, "bias"))
