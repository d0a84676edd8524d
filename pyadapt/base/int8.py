"""pyadapt's own int8 weight: symmetric, one fp32 scale an output row.

    W[n, k] = weight[n, k] * scale[n],   scale[n] = max |W[n, :]| / 127

Both are frozen parameters, `weight` int8 (N, K) and `weight_scale` (N,): sharding engines shard parameters and
replicate buffers. The scale's fp32 bits are held as int32, since mixed precision and `.half()` would round a
floating tensor.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..dtypes import output_dtype, product_input
from ..lookup import parameter
from ..ops import quantize  # noqa: F401 - defines the ops quantize_rows and dequantize_rows
from ..ops.linear import FrozenLinear
from ..surgery import adopt, release
from .dense import Dense
from .kind import BaseWeight, Operands, check_at_hand, register

# Elements of a weight that are quantised in one call.
QUANTIZED_AT_ONCE = 1 << 22


class Int8Layer(nn.Module):
    """What a linear layer with an int8 weight does otherwise: its forward."""

    weight: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None
    # What the layer was before, for the way back.
    dense_dtype: torch.dtype
    # The attribute that answers as `bias` while a trained copy does.
    live_bias: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in the dtype of x, or autocast's."""
        x = product_input(x)
        if self.live_bias is None:
            return FrozenLinear.apply(x, self, output_dtype(x))
        # A bias that is trained is added where autograd sees it.
        y = FrozenLinear.apply(x, self, output_dtype(x), False)
        return y + cast(Tensor, self.bias).to(y.dtype)

    def operands(self) -> Operands:
        """The int8 weight, its scale and the bias; read again in backward."""
        check_at_hand(self)
        scale = parameter(self, "weight_scale").view(torch.float32)
        return Operands(parameter(self, "weight"), scale, parameter(self, "bias"))


@register
class Int8(BaseWeight):
    """`weight` int8 (N, K) for `Linear` and `Conv1D` alike, with `weight_scale` beside it."""

    name = "int8"
    quantized = True

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `BaseWeight.accepts`."""
        return isinstance(layer, Int8Layer)

    @staticmethod
    def shape(layer: Any) -> tuple[int, int]:
        """See `BaseWeight.shape`."""
        return Dense.shape(layer)

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        """See `BaseWeight.dtype`."""
        return layer.dense_dtype

    @staticmethod
    def operands(layer: Any) -> Operands:
        """See `BaseWeight.operands`."""
        return Int8Layer.operands(layer)

    @staticmethod
    def matrix(layer: Any) -> Tensor:
        """See `BaseWeight.matrix`."""
        scale = layer.weight_scale.detach().view(torch.float32)
        wide = torch.promote_types(Int8.dtype(layer), torch.float32)
        return torch.ops.pyadapt.dequantize_rows(layer.weight.detach(), scale, wide)

    @staticmethod
    def assign(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.assign`; quantised again, row by row."""
        weight, scale = _quantize(matrix)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.weight_scale.copy_(scale)

    @staticmethod
    def make_dense(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.make_dense`."""
        plain = Int8.plain(layer, matrix)["weight"]
        release(layer, Int8Layer)
        del layer.weight_scale, layer.dense_dtype
        layer.weight = nn.Parameter(plain, requires_grad=False)

    @staticmethod
    def stored(layer: Any) -> dict[str, nn.Parameter]:
        """See `BaseWeight.stored`."""
        return {"weight": layer.weight, "weight_scale": layer.weight_scale}

    @staticmethod
    def quantization_error(layer: Any) -> float:
        """See `BaseWeight.quantization_error`; estimated: rounding is uniform, scale / sqrt(12) an element."""
        return error_of_rows(layer.weight, layer.weight_scale.view(torch.float32))


def error_of_rows(weight: Tensor, scale: Tensor) -> float:
    """The relative error (Frobenius norm) to be expected of an int8 weight (N, K) with one scale a row, (N,)."""
    squares = scale.double().square()
    mass = (weight.to(torch.float32).square().sum(1).double() * squares).sum()
    return 0.0 if mass == 0 else math.sqrt(float(squares.sum() * weight.shape[1] / 12 / mass))


def make_int8(layer: Any) -> None:
    """Quantise a dense linear layer in place.

    Raises:
        ValueError: the weight holds a NaN or an infinity.
    """
    weight, scale = _quantize(Dense.operands(layer).weight.detach())
    _become_int8(layer, weight, scale)


def make_empty_int8(layer: Any) -> None:
    """Give a dense layer int8 parameters of the right shape without values, for a checkpoint to fill."""
    device = layer.weight.device
    n, k = Dense.shape(layer)
    weight = torch.empty(n, k, dtype=torch.int8, device=device)
    scale = torch.empty(n, dtype=torch.int32, device=device)
    _become_int8(layer, weight, scale)


def _quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix` (N, K) as int8 (N, K) and the int32 bits of its fp32 scale (N,).

    Some rows at a time: in one piece, the temporaries of a large layer would be several times its size.
    """
    n, k = matrix.shape
    weight = torch.empty(n, k, dtype=torch.int8, device=matrix.device)
    scale = torch.empty(n, dtype=torch.float32, device=matrix.device)
    rows = max(1, QUANTIZED_AT_ONCE // max(1, k))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        weight[part], scale[part] = torch.ops.pyadapt.quantize_rows(matrix[part])
    return weight, scale.view(torch.int32)


def _become_int8(layer: Any, weight: Tensor, scale: Tensor) -> None:
    dtype = Dense.dtype(layer)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    layer.dense_dtype = dtype
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    adopt(layer, Int8Layer)
