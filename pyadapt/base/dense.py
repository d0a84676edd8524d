"""A weight in a floating dtype: `torch.nn.Linear` (N, K), and transformers' `Conv1D`, which stores (K, N)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..lookup import parameter
from .kind import BaseWeight, Operands, check_at_hand, is_conv1d, register


@register
class Dense(BaseWeight):
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
    def dtype(layer: Any) -> torch.dtype:
        """See `BaseWeight.dtype`."""
        return layer.weight.dtype

    @staticmethod
    def operands(layer: Any) -> Operands:
        """See `BaseWeight.operands`."""
        check_at_hand(layer)
        weight: Tensor = parameter(layer, "weight")
        return Operands(weight.t() if is_conv1d(layer) else weight, None, parameter(layer, "bias"))

    @staticmethod
    def matrix(layer: Any) -> Tensor:
        """See `BaseWeight.matrix`."""
        weight = Dense.operands(layer).weight.detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    @staticmethod
    def assign(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.assign`; in place, so that tied weights stay tied."""
        with torch.no_grad():
            layer.weight.copy_(Dense.plain(layer, matrix)["weight"])

    @staticmethod
    def make_dense(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.make_dense`."""
        Dense.assign(layer, matrix)

    @staticmethod
    def stored(layer: Any) -> dict[str, nn.Parameter]:
        """See `BaseWeight.stored`."""
        return {"weight": layer.weight}
