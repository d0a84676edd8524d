"""Weights that bitsandbytes has quantised: `Linear8bitLt` and `Linear4bit`.

    int8:  W[n, k] = q[n, k] * SCB[n] / 127
    4-bit: W = code[q] * absmax of its block, blocks of 32 to 4096 values in row-major order

The kernels read the int8 weight and its row scales where bitsandbytes keeps them. A 4-bit weight is dequantised by
bitsandbytes for each product, in forward and again in backward, and freed after it. Nothing of the layer is changed:
its own forward serves whenever no adapter is at work. That forward rounds inputs to int8, all but the columns beyond
`llm_int8_threshold`; under an adapter every column is multiplied in the input's own precision.

Sources: Dettmers et al., "LLM.int8()", 2022; Dettmers et al., "QLoRA", 2023.
"""

from __future__ import annotations

import abc
import copy
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import quantize  # noqa: F401 - defines the op dequantize_rows
from ..surgery import make_plain, make_under
from .int8 import Int8Layer, error_of_rows
from .kind import BaseWeight, Operands, check_at_hand, register

# What the classes of bitsandbytes, and transformers on them, set on a layer beside what a linear layer has.
_OWN_ATTRIBUTES = (
    "state", "index", "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage",
    "support_avx512bf16_for_cpu", "source_cls",
)  # fmt: skip


class Bitsandbytes(BaseWeight):
    """What the two kinds share; both hold a layer of N outputs and K inputs."""

    quantized = True
    class_name: str

    @classmethod
    def accepts(cls, layer: Any) -> bool:
        """See `BaseWeight.accepts`; where bitsandbytes was never imported there is no such layer."""
        layers = getattr(sys.modules.get("bitsandbytes"), "nn", None)
        return layers is not None and isinstance(layer, getattr(layers, cls.class_name))

    @classmethod
    def shape(cls, layer: Any) -> tuple[int, int]:
        """See `BaseWeight.shape`.

        Raises:
            ValueError: the weight is not quantised, or not for good.
        """
        problem = cls.problem(layer)
        if problem is not None:
            raise ValueError(f"this {type(layer).__name__} {problem}")
        return layer.out_features, layer.in_features

    @classmethod
    @abc.abstractmethod
    def problem(cls, layer: Any) -> str | None:
        """Why the weight cannot be read, with the way out, or None."""

    @classmethod
    def merged_dtype(cls, layer: Any, others: torch.dtype | None) -> torch.dtype:
        """See `BaseWeight.merged_dtype`: that of the others, for a plain layer casts no input."""
        return cls.dtype(layer) if others is None else others

    @classmethod
    def plain(cls, layer: Any, matrix: Tensor) -> dict[str, Tensor]:
        """See `BaseWeight.plain`; the dtype is the caller's, who has asked `merged_dtype`."""
        return {"weight": matrix.t().contiguous() if cls.plain_is_transposed(layer) else matrix}

    @classmethod
    def plain_is_transposed(cls, layer: Any) -> bool:
        """See `BaseWeight.plain_is_transposed`; transformers notes the class that a layer was made from."""
        return _was_conv1d(layer)

    @classmethod
    def make_dense(cls, layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.make_dense`: a `torch.nn.Linear`, or the `Conv1D` that the layer was made from."""
        plain, original = cls.plain(layer, matrix)["weight"], _forget_bitsandbytes(layer)
        layer.weight = nn.Parameter(plain, requires_grad=False)
        if layer.bias is not None:
            # Its forward casts the bias to the dtype of its input; a plain layer does not.
            layer.bias.data = layer.bias.data.to(plain.dtype)
        make_plain(layer, original)

    @classmethod
    def stored(cls, layer: Any) -> dict[str, nn.Parameter]:
        """See `BaseWeight.stored`; what the weight is read with is no parameter of its own."""
        return {"weight": layer.weight}

    @classmethod
    def state_names(cls, layer: Any) -> list[str]:
        """See `BaseWeight.state_names`."""
        names: dict[str, Tensor] = {}
        layer._save_to_state_dict(names, "", False)
        return [name for name in names if name != "bias"]


@register
class BitsandbytesInt8(Bitsandbytes):
    """`Linear8bitLt`: int8 `weight` (N, K); `SCB` (N,) fp32 on the weight, or in `state` after its first forward."""

    name = "bitsandbytes int8"
    class_name = "Linear8bitLt"

    @classmethod
    def problem(cls, layer: Any) -> str | None:
        """See `Bitsandbytes.problem`."""
        if layer.state.has_fp16_weights:
            return (
                f"keeps its weight in {layer.weight.dtype} and quantises it in each forward; "
                "load the model with llm_int8_has_fp16_weight=False"
            )
        if layer.weight.dtype != torch.int8:
            return f"holds {layer.weight.dtype}, not quantised yet; move it to its device first: model.to(device)"
        return None

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        """See `BaseWeight.dtype`; fp16, through which bitsandbytes quantises, as it remembers no other."""
        return torch.float16

    @staticmethod
    def operands(layer: Any) -> Operands:
        """See `BaseWeight.operands`."""
        check_at_hand(layer)
        return Operands(layer.weight, _SCB(layer) / 127, layer.bias)

    @staticmethod
    def matrix(layer: Any) -> Tensor:
        """See `BaseWeight.matrix`."""
        weight, scale, _ = BitsandbytesInt8.operands(layer)
        return torch.ops.pyadapt.dequantize_rows(weight.detach(), scale, torch.float32)

    @staticmethod
    def assign(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.assign`; quantised again by bitsandbytes."""
        import bitsandbytes.functional as functional

        weight, SCB, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
        BitsandbytesInt8.put_back(layer, {"weight": weight, "SCB": SCB})

    @staticmethod
    def keep(layer: Any) -> dict[str, Any]:
        """See `BaseWeight.keep`."""
        return {"weight": layer.weight.detach().clone(), "SCB": _SCB(layer).clone()}

    @staticmethod
    def put_back(layer: Any, kept: Mapping[str, Any]) -> None:
        """See `BaseWeight.put_back`."""
        with torch.no_grad():
            layer.weight.copy_(kept["weight"])
            _SCB(layer).copy_(kept["SCB"])
        # A copy of a layer has two int8 tensors until its first forward; let both be the one that was written.
        holder = layer.state if layer.weight.CB is None else layer.weight
        holder.CB = layer.weight.data

    @staticmethod
    def quantization_error(layer: Any) -> float:
        """See `BaseWeight.quantization_error`; estimated: rounding is uniform, scale / sqrt(12) an element."""
        return error_of_rows(layer.weight, _SCB(layer) / 127)


@register
class Bitsandbytes4bit(Bitsandbytes):
    """`Linear4bit`: two values a byte in a tensor of any storage dtype, and a `quant_state` on the weight."""

    name = "bitsandbytes 4-bit"
    class_name = "Linear4bit"

    @classmethod
    def problem(cls, layer: Any) -> str | None:
        """See `Bitsandbytes.problem`."""
        if _quant_state(layer) is None:
            return f"holds {layer.weight.dtype}, not quantised yet; move it to its device first: model.to(device)"
        return None

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        """See `BaseWeight.dtype`."""
        return _quant_state(layer).dtype

    @staticmethod
    def operand_dtype(layer: Any) -> torch.dtype:
        """See `BaseWeight.operand_dtype`."""
        return Bitsandbytes4bit.dtype(layer)

    @staticmethod
    def operands(layer: Any) -> Operands:
        """See `BaseWeight.operands`; W is a new tensor in the dtype it had before it was quantised."""
        import bitsandbytes.functional as functional

        check_at_hand(layer)
        packed, state = _packed(layer)
        return Operands(functional.dequantize_4bit(packed, state), None, layer.bias)

    @staticmethod
    def matrix(layer: Any) -> Tensor:
        """See `BaseWeight.matrix`."""
        return Bitsandbytes4bit.operands(layer).weight.to(torch.float32)

    @staticmethod
    def assign(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.assign`; quantised again by bitsandbytes, in blocks of the same size."""
        import bitsandbytes.functional as functional

        old = _quant_state(layer)
        # The layout for CPU inference has put plain scales into the place of quantised ones.
        nested = getattr(old, "original_nested", old.nested)
        packed, state = functional.quantize_4bit(
            matrix.to(old.dtype),
            blocksize=old.blocksize,
            compress_statistics=nested,
            quant_type=old.quant_type,
            quant_storage=layer.quant_storage,
        )
        _replace(layer, packed, state)

    @staticmethod
    def keep(layer: Any) -> dict[str, Any]:
        """See `BaseWeight.keep`."""
        return {"weight": layer.weight.detach().clone(), "quant_state": copy.deepcopy(_quant_state(layer))}

    @staticmethod
    def put_back(layer: Any, kept: Mapping[str, Any]) -> None:
        """See `BaseWeight.put_back`."""
        device = layer.weight.device
        kept["quant_state"].to(device)
        _replace(layer, kept["weight"].to(device), kept["quant_state"])

    @staticmethod
    def quantization_error(layer: Any) -> float:
        """See `BaseWeight.quantization_error`; estimated: values spread evenly over the cell of each code."""
        import bitsandbytes.functional as functional

        packed, state = _packed(layer)
        code, count = state.code.double(), state.shape.numel()
        halves = packed.contiguous().view(torch.uint8).flatten()
        q = torch.stack([halves >> 4, halves & 15], dim=1).flatten()[:count].to(torch.int64)
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        blocks = torch.arange(count, device=q.device) // state.blocksize
        # Sums over a block, each times the square of its scale.
        squares = absmax.double().square()

        def total(table: Tensor) -> float:
            sums = torch.zeros_like(squares).index_add_(0, blocks, table.to(q.device)[q])
            return float((sums * squares).sum())

        mass = total(code.square())
        return 0.0 if mass == 0 else math.sqrt(total(_cell_errors(code)) / mass)


def to_int8(layer: Any, dtype: torch.dtype) -> None:
    """Make a `Linear8bitLt`, adapted or not, a layer of pyadapt's own int8 (`base.int8`), in place.

    The int8 values are the same tensor. The scale is SCB / 127, rounded once in fp32: what the kernels here read of the
    layer before, so that they give the same bits. The layer's own forward no longer rounds its input to int8, as that
    of bitsandbytes does.

    Args:
        layer: the layer.
        dtype: floating dtype that its weight takes when it is merged.

    Raises:
        ValueError: the weight is not quantised, or not for good.
        RuntimeError: the weight is offloaded.
    """
    BitsandbytesInt8.shape(layer)
    weight, scale, _ = BitsandbytesInt8.operands(layer)
    assert scale is not None
    original = _forget_bitsandbytes(layer)
    # Not `detach`, which would give bitsandbytes' own class of parameter.
    layer.weight = nn.Parameter(weight.data, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale.detach().view(torch.int32), requires_grad=False)
    layer.dense_dtype = dtype
    make_under(layer, original, Int8Layer)


def _forget_bitsandbytes(layer: Any) -> type[nn.Module]:
    """Take off what bitsandbytes has set on `layer` beside its weight; the class that it was made from."""
    was_conv1d = _was_conv1d(layer)
    original = layer.source_cls if was_conv1d else nn.Linear
    for name in _OWN_ATTRIBUTES:
        layer.__dict__.pop(name, None)
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook).__module__.startswith("bitsandbytes"):
            del layer._load_state_dict_pre_hooks[key]
    if was_conv1d:
        layer.nf, layer.nx = layer.__dict__.pop("out_features"), layer.__dict__.pop("in_features")
    return original


def _was_conv1d(layer: Any) -> bool:
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    source = getattr(layer, "source_cls", None)
    return pytorch_utils is not None and source is not None and issubclass(source, pytorch_utils.Conv1D)


def _SCB(layer: Any) -> Tensor:
    """The scales of an int8 layer, (N,) fp32."""
    on_weight = getattr(layer.weight, "SCB", None)
    return layer.state.SCB if on_weight is None else on_weight


def _quant_state(layer: Any) -> Any:
    on_weight = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if on_weight is None else on_weight


def _packed(layer: Any) -> tuple[Tensor, Any]:
    """The packed weight and its state as they were quantised.

    On a CPU with AVX-512 and bf16, bitsandbytes' own forward changes them in evaluation mode to a layout that its
    dequantisation does not read.
    """
    import bitsandbytes.functional as functional

    weight, state = layer.weight.detach(), _quant_state(layer)
    if getattr(state, "packing_format_for_cpu", False):
        return functional._convert_weight_packed_for_cpu_inverse(weight, copy.copy(state))
    return weight, state


def _replace(layer: Any, packed: Tensor, state: Any) -> None:
    layer.weight.data = packed
    layer.weight.quant_state = layer.quant_state = state


def _cell_errors(code: Tensor) -> Tensor:
    """The mean square distance to each of the 16 codes from values that are spread evenly over its cell.

    A cell reaches half way to the neighbours, a and b; its mean square is (a^3 + b^3) / (3 (a + b)).
    """
    values = code.unique()
    half = values.diff() / 2
    edge = half.new_zeros(1)
    a, b = torch.cat([edge, half]), torch.cat([half, edge])
    errors = (a**3 + b**3) / (3 * (a + b))
    return errors[torch.searchsorted(values, code)]
