"""A weight in a floating dtype: `torch.nn.Linear` (N, K), and transformers' `Conv1D`, which stores (K, N)."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from .kind import BaseWeight, Operands, register


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is transformers' Conv1D, the transposed linear layer of GPT-2."""
    # Not imported for the question's sake: where transformers was never imported there is no such layer.
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(layer, module.Conv1D)


@register
class Dense(BaseWeight):
    """`weight` as the layer's class stores it."""

    name = "dense"

    @staticmethod
    def accepts(layer: nn.Module) -> bool:
        """See `BaseWeight.accepts`."""
        is_linear = isinstance(layer, nn.Linear) or is_conv1d(layer)
        weight = getattr(layer, "weight", None)
        return is_linear and isinstance(weight, Tensor) and weight.is_floating_point()

    @staticmethod
    def shape(layer: nn.Module) -> tuple[int, int]:
        """See `BaseWeight.shape`; the layer's own numbers, since a sharding engine may hold an empty weight."""
        if is_conv1d(layer):
            return layer.nf, layer.nx  # type: ignore[return-value]
        return layer.out_features, layer.in_features  # type: ignore[return-value]

    @staticmethod
    def dtype(layer: nn.Module) -> torch.dtype:
        """See `BaseWeight.dtype`."""
        return layer.weight.dtype  # type: ignore[return-value]

    @staticmethod
    def operands(layer: nn.Module) -> Operands:
        """See `BaseWeight.operands`."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return Operands(weight.t() if is_conv1d(layer) else weight, None, layer.bias)  # type: ignore[arg-type]

    @staticmethod
    def matrix(layer: nn.Module) -> Tensor:
        """See `BaseWeight.matrix`."""
        weight = Dense.operands(layer).weight.detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    @staticmethod
    def assign(layer: nn.Module, matrix: Tensor) -> None:
        """See `BaseWeight.assign`; in place, so that tied weights stay tied."""
        with torch.no_grad():
            layer.weight.copy_(Dense.plain(layer, matrix))  # type: ignore[operator]

    @staticmethod
    def make_dense(layer: nn.Module, matrix: Tensor) -> None:
        """See `BaseWeight.make_dense`."""
        Dense.assign(layer, matrix)

    @staticmethod
    def plain(layer: nn.Module, matrix: Tensor) -> Tensor:
        """See `BaseWeight.plain`."""
        matrix = matrix.to(Dense.dtype(layer))
        return matrix.t().contiguous() if is_conv1d(layer) else matrix

    @staticmethod
    def stored(layer: nn.Module) -> dict[str, nn.Parameter]:
        """See `BaseWeight.stored`."""
        return {"weight": layer.weight}  # type: ignore[dict-item]
