"""pyadapt's own int8 weight: symmetric, one fp32 scale an output row.

    W[n, k] = weight[n, k] * scale[n],   scale[n] = max |W[n, :]| / 127

Both are frozen parameters, `weight` int8 (N, K) and `weight_scale` (N,): sharding engines shard parameters and
replicate buffers. The scale's fp32 bits are held as int32, since mixed precision and `.half()` would round a
floating tensor.

FSDP1 can flatten no integers. For it the bytes of both are viewed as a floating dtype (`store_as`), in which they are
moved, never computed with; kernels, merges and state dicts have int8 and int32 all the same. A cast would destroy them
and leave no trace, so the dtype is looked at in each forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    # The floating dtype in whose bytes `weight` and `weight_scale` are held, each in one dimension; None for integers.
    stored_as: torch.dtype | None = None
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
        weight, scale = parameter(self, "weight"), parameter(self, "weight_scale")
        if self.stored_as is not None:
            weight, scale = _integers(self, weight, scale)
        return Operands(weight, scale.view(torch.float32), parameter(self, "bias"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As that of any module, but no cast (`.half()`) reaches bytes that only look like floating numbers."""
        dtype = self.stored_as
        if dtype is None or not _is_whole(self):
            return super()._apply(fn, recurse)
        store_as(self, None)
        try:
            return super()._apply(fn, recurse)
        finally:
            store_as(self, dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As that of any module; integers, unless this rank holds a part of them alone."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored_as is not None and _is_whole(self):
            weight, scale = _integers(self, self.weight.detach(), self.weight_scale.detach())
            destination[f"{prefix}weight"], destination[f"{prefix}weight_scale"] = weight, scale

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """As that of any module, from integers."""
        for name in ("weight", "weight_scale"):
            value = state_dict.get(prefix + name)
            if self.stored_as is not None and value is not None and not value.is_floating_point():
                state_dict[prefix + name] = _bytes_as(value, self.stored_as)
        super()._load_from_state_dict(state_dict, prefix, *rest)


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
        weight, scale = _own_integers(layer)
        wide = torch.promote_types(Int8.dtype(layer), torch.float32)
        return torch.ops.pyadapt.dequantize_rows(weight, scale.view(torch.float32), wide)

    @staticmethod
    def assign(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.assign`; quantised again, row by row."""
        weight, scale = _quantize(matrix)
        Int8.put_back(layer, {"weight": weight, "weight_scale": scale})

    @classmethod
    def operand_dtype(cls, layer: Any) -> torch.dtype:
        """See `BaseWeight.operand_dtype`."""
        return torch.int8

    @classmethod
    def keep(cls, layer: Any) -> dict[str, Any]:
        """See `BaseWeight.keep`; whatever they are held in by then, they are integers here."""
        weight, scale = _own_integers(layer)
        return {"weight": weight.clone(), "weight_scale": scale.clone()}

    @classmethod
    def put_back(cls, layer: Any, kept: Mapping[str, Any]) -> None:
        """See `BaseWeight.put_back`."""
        weight, scale = _own_integers(layer)
        weight.copy_(kept["weight"])
        scale.copy_(kept["weight_scale"])

    @staticmethod
    def make_dense(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.make_dense`."""
        plain = Int8.plain(layer, matrix)["weight"]
        release(layer, Int8Layer)
        del layer.weight_scale, layer.dense_dtype
        layer.__dict__.pop("stored_as", None)
        layer.weight = nn.Parameter(plain, requires_grad=False)

    @staticmethod
    def stored(layer: Any) -> dict[str, nn.Parameter]:
        """See `BaseWeight.stored`."""
        return {"weight": layer.weight, "weight_scale": layer.weight_scale}

    @staticmethod
    def quantization_error(layer: Any) -> float:
        """See `BaseWeight.quantization_error`; estimated: rounding is uniform, scale / sqrt(12) an element."""
        weight, scale = _own_integers(layer)
        return error_of_rows(weight, scale.view(torch.float32))


def error_of_rows(weight: Tensor, scale: Tensor) -> float:
    """The relative error (Frobenius norm) to be expected of an int8 weight (N, K) with one scale a row, (N,)."""
    squares = scale.double().square()
    mass = (weight.to(torch.float32).square().sum(1).double() * squares).sum()
    return 0.0 if mass == 0 else math.sqrt(float(squares.sum() * weight.shape[1] / 12 / mass))


def store_as(layer: Any, dtype: torch.dtype | None) -> None:
    """Hold the weight and the scale of an int8 layer in the bytes of another dtype; nothing is rounded.

    Args:
        layer: a layer with an int8 weight, before it is sharded.
        dtype: bfloat16, float16 or float32, or None for integers.

    Raises:
        ValueError: another dtype, or another kind of layer.
        RuntimeError: this rank holds a part of the weight alone.
    """
    if not isinstance(layer, Int8Layer):
        raise ValueError(f"a {type(layer).__name__} with {layer.weight.dtype} holds no int8 weight of pyadapt")
    check_storage_dtype(dtype)
    if dtype == layer.stored_as:
        return
    if not _is_whole(layer):
        raise RuntimeError(
            f"the int8 weight of this {type(layer).__name__} is sharded already: choose its storage dtype before"
        )
    for name, integers in zip(("weight", "weight_scale"), _own_integers(layer), strict=True):
        value = integers if dtype is None else _bytes_as(integers, dtype)
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
    layer.stored_as = dtype


def check_storage_dtype(dtype: torch.dtype | None) -> None:
    """Refuse what `store_as` cannot take.

    Raises:
        ValueError: it is none of the dtypes.
    """
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"storage_dtype={dtype} is not bfloat16, float16, float32 or None")


def _bytes_as(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of a tensor in one dimension, viewed as `dtype`; with zeros behind them where they do not fill it."""
    size = torch.empty(0, dtype=dtype).element_size()
    flat = integers.contiguous().view(torch.int8).flatten()
    if flat.numel() % size:
        flat = nn.functional.pad(flat, (0, size - flat.numel() % size))
    # A file that is mapped into memory has its tensors anywhere.
    if flat.storage_offset() % size or (not flat.is_meta and flat.data_ptr() % size):
        flat = flat.clone()
    return flat.view(dtype)


def _integers(layer: Any, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` int8 (N, K) and `scale` int32 (N,), views of what is held in the bytes of another dtype.

    Raises:
        RuntimeError: they were cast.
    """
    for held in (weight, scale):
        if held.dtype != layer.stored_as:
            raise RuntimeError(
                f"the int8 weight of this {type(layer).__name__} is held in the bytes of {layer.stored_as}, and was "
                f"cast to {held.dtype}, which destroys it: shard with MixedPrecision(param_dtype={layer.stored_as}) or "
                "none (accelerate: `mixed_precision: bf16` casts to torch.bfloat16, `no` does not), or choose "
                f"pyadapt.quantize(model, storage_dtype={held.dtype}) before"
            )
    n, k = Dense.shape(layer)
    return weight.view(torch.int8)[: n * k].view(n, k), scale.view(torch.int32)[:n]


def _own_integers(layer: Any) -> tuple[Tensor, Tensor]:
    """The layer's weight int8 (N, K) and scale int32 (N,), outside of autograd; writing to them writes to the layer."""
    weight, scale = layer.weight.detach(), layer.weight_scale.detach()
    return (weight, scale) if layer.stored_as is None else _integers(layer, weight, scale)


def _is_whole(layer: Any) -> bool:
    """Whether this rank has all of the weight and the scale, in tensors of their own."""
    n, k = Dense.shape(layer)
    for name, size in (("weight", n * k), ("weight_scale", 4 * n)):
        held: Any = getattr(layer, name, None)
        plain = isinstance(held, Tensor) and type(held) in (Tensor, nn.Parameter)
        if not plain or held.numel() * held.element_size() < size or held.untyped_storage().nbytes() < size:
            return False
    return True


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
