"""What can carry an adapter, and what a kind of frozen weight is: a matrix that can be read, and written at a merge."""

from __future__ import annotations

import abc
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

# Asked in order, the quantised ones first, as their layers may look dense; a file in `base/` adds its kind with
# `@register`.
KINDS: list[type[BaseWeight]] = []


class Operands(NamedTuple):
    """What a kernel reads of a frozen layer.

    Attributes:
        weight: (N, K), a view of the layer's own parameter where that can be multiplied as it is, else a tensor for
            this product alone; either dimension may be the contiguous one.
        weight_scale: (N,) fp32 for an int8 weight, else None.
        bias: (N,) or None.
    """

    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None


class Host(abc.ABC):
    """A stateless description of one kind of module that carries units; every method takes the module.

    Most are layers with a weight (`BaseWeight`); the others are parts of a transformer (see `anatomy`).
    """

    name: ClassVar[str]
    # What the module computes: "linear", "conv", "embedding", "experts", ... A method has one unit a form.
    form: ClassVar[str] = "linear"
    # Whether the stored weight is less exact than the one it was made from.
    quantized: ClassVar[bool] = False
    # What is put on such a module, where it is another mixin than `layer.AdaptedLayer`.
    mixin: ClassVar[type[nn.Module] | None] = None

    @staticmethod
    @abc.abstractmethod
    def accepts(layer: Any) -> bool:
        """Whether `layer` is a module of this kind."""

    @staticmethod
    @abc.abstractmethod
    def shape(layer: Any) -> tuple[int, int]:
        """Output and input features, (N, K): of a weight the shape of `BaseWeight.matrix`."""

    @staticmethod
    @abc.abstractmethod
    def dtype(layer: Any) -> torch.dtype:
        """The floating dtype that the weights have, or had before they were quantised."""

    @staticmethod
    @abc.abstractmethod
    def stored(layer: Any) -> dict[str, nn.Parameter]:
        """The parameters that hold the weight, by attribute name: the weight first, then what it is read with."""


class BaseWeight(Host):
    """A stateless description of one kind of layer weight; every method takes the layer, a `torch.nn.Module`."""

    @staticmethod
    @abc.abstractmethod
    def operands(layer: Any) -> Operands:
        """Read the weight, inside the forward of `layer` or in backward. The result must not be kept."""

    @staticmethod
    @abc.abstractmethod
    def matrix(layer: Any) -> Tensor:
        """The weight as a new tensor of shape `shape(layer)` in fp32, or fp64 for an fp64 weight."""

    @staticmethod
    @abc.abstractmethod
    def assign(layer: Any, matrix: Tensor) -> None:
        """Write `matrix` into the layer, in this kind's own storage."""

    @staticmethod
    @abc.abstractmethod
    def make_dense(layer: Any, matrix: Tensor) -> None:
        """Make `layer` a plain layer that holds `matrix` in its original dtype."""

    @classmethod
    def merged_dtype(cls, layer: Any, others: torch.dtype | None) -> torch.dtype:
        """The dtype that a merge gives the plain layer; `others` is that of the model's dense parameters, if any."""
        return cls.dtype(layer)

    @classmethod
    def plain(cls, layer: Any, matrix: Tensor) -> dict[str, Tensor]:
        """`matrix` as the plain layer would store it, by attribute name: original dtype and orientation."""
        matrix = matrix.to(cls.dtype(layer))
        return {"weight": matrix.t().contiguous() if cls.plain_is_transposed(layer) else matrix}

    @classmethod
    def plain_is_transposed(cls, layer: Any) -> bool:
        """Whether the plain layer stores its weight as (K, N)."""
        return is_conv1d(layer)

    @classmethod
    def operand_dtype(cls, layer: Any) -> torch.dtype:
        """The dtype of the weight that `operands` gives."""
        return next(iter(cls.stored(layer).values())).dtype

    @classmethod
    def state_names(cls, layer: Any) -> list[str]:
        """The names in the layer's state dict that hold the weight and what it is read with."""
        return list(cls.stored(layer))

    @classmethod
    def keep(cls, layer: Any) -> dict[str, Any]:
        """Copies of all that the weight is made of, for `put_back`."""
        return {name: value.detach().clone() for name, value in cls.stored(layer).items()}

    @classmethod
    def put_back(cls, layer: Any, kept: Mapping[str, Any]) -> None:
        """Give the layer, bit for bit, the weight that `keep` has copied."""
        with torch.no_grad():
            for name, value in cls.stored(layer).items():
                value.copy_(kept[name])

    @staticmethod
    def quantization_error(layer: Any) -> float:
        """The relative error (Frobenius norm) that quantising has put into the weight, as far as it can be known."""
        return 0.0


def is_conv1d(layer: Any) -> bool:
    """Whether `layer` is transformers' Conv1D, the transposed linear layer of GPT-2."""
    # Not imported for the question's sake: where transformers was never imported there is no such layer.
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(layer, module.Conv1D)


def check_at_hand(layer: nn.Module) -> None:
    """Refuse to read a weight that accelerate keeps elsewhere at the moment: it has no values here.

    Raises:
        RuntimeError: the layer is offloaded, and this is not its forward.
    """
    if "_hf_hook" in layer.__dict__ and layer.weight.is_meta:
        raise RuntimeError(
            f"the weight of this {type(layer).__name__} is offloaded and at hand during its forward only; "
            "to train or merge, load the model without offloading to the CPU or the disk"
        )


def register(kind: type[BaseWeight]) -> type[BaseWeight]:
    """Class decorator: add a kind of base weight."""
    KINDS.append(kind)
    KINDS.sort(key=lambda kind: not kind.quantized)
    return kind


def base_of(layer: Any) -> type[BaseWeight] | None:
    """The kind of weight that `layer` holds, or None if it is no layer that can be adapted."""
    return next((kind for kind in KINDS if kind.accepts(layer)), None)
