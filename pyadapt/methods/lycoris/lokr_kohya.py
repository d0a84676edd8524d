"""LoKr as LyCORIS writes it: with PEFT's keys, from which rank, scaling and the split of the dimensions follow.

A factor that is full says nothing of the rank that was asked for, and PEFT's configuration decides by the rank which
factors are full. So the rank here is one that gives just the shapes of the file, and alpha the scaling:

    w2 of rank r:        r, alpha of the file
    both factors full:   half of the largest dimension, and alpha = r, as LyCORIS scales such a pair by 1

LyCORIS splits a dimension as PEFT does, but puts the smaller part first where its factor is the larger one, and, with
unbalanced_factorization, the larger part of the outputs. `decompose_factor` is one number that gives the split of all
layers, if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ...config import AdapterConfig
from ...kohya.reader import FileLayer, FileUnit, Reader, register
from .lokr import LoKrConfig, factorization

_ONE_SPLIT = "one decompose_factor gives one split, which LyCORIS' unbalanced_factorization turns round for outputs"


class Split(NamedTuple):
    """A dimension as a product: the part in w1, and that in w2."""

    first: int
    second: int


class Form(NamedTuple):
    """What a layer says of the options that all layers share.

    Attributes:
        splits: dimension -> its parts.
        w1_is_full: whether the file has w1 as it is.
        is_small: whether PEFT would make it a product, if asked to.
    """

    splits: dict[int, Split]
    w1_is_full: bool
    is_small: bool


@register
class LoKrReader(Reader):
    """Reads LoKr; convolutions taken apart (LyCORIS' Tucker form) are `use_effective_conv2d` here."""

    config_class: ClassVar[type[AdapterConfig]] = LoKrConfig
    marks: ClassVar[frozenset[str]] = frozenset(
        {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    )
    keys: ClassVar[frozenset[str]] = marks | {"alpha", "scalar", "dora_scale"}
    scaled: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a")

    @classmethod
    def read(cls, layer: FileLayer) -> FileUnit:
        """See `Reader.read`."""
        layer.refuse("dora_scale", "the norm of DoRA, which LoKr here has not")
        (N, K), kernel = layer.base.shape(layer.layer), layer.kernel
        channels = K // math.prod(kernel)
        first, rank1 = _first(layer)
        if N % first[0] or channels % first[1]:
            raise ValueError(f"w1 is {first}, and the layer has {N} outputs and {channels} inputs")
        out, inner = Split(first[0], N // first[0]), Split(first[1], channels // first[1])
        tensors, rank2 = _second(layer, out.second, inner.second)
        tensors |= {key: layer.tensors[key] for key in ("lokr_w1", "lokr_w1_a", "lokr_w1_b") if key in layer.tensors}
        ranks = {rank for rank in (rank1, rank2) if rank}
        if len(ranks) > 1:
            raise ValueError(f"w1 is of rank {rank1} and w2 of rank {rank2}; LoKr here has one for both")
        r = max(ranks, default=max(1, math.ceil(max(*out, *inner) / 2)))
        if bool(rank2) != (r < max(out.second, inner.second) / 2):
            raise ValueError(f"at rank {r} w2 of {out.second} x {inner.second} would have the other form here")
        if channels == N and out != inner:
            raise ValueError(
                f"{N} outputs are split as {tuple(out)} and as many inputs as {tuple(inner)}: {_ONE_SPLIT}"
            )
        options = {"use_effective_conv2d": "lokr_t2" in tensors} if rank2 and math.prod(kernel) > 1 else {}
        form = Form({N: out, channels: inner}, rank1 == 0, r < max(out.first, inner.first) / 2)
        # LyCORIS scales a pair of full factors by 1, whatever alpha is in the file.
        return FileUnit(tensors, r, layer.alpha(r) if ranks else float(r), options, form)

    @classmethod
    def options(cls, units: Mapping[str, FileUnit]) -> dict[str, Any]:
        """See `Reader.options`."""
        splits: dict[int, Split] = {}
        both = any(not unit.form.w1_is_full for unit in units.values())
        for path, unit in units.items():
            if unit.form.w1_is_full == (both and unit.form.is_small):
                form = "a product" if unit.form.w1_is_full else "full"
                raise ValueError(f"w1 of {path} would be {form} here: decompose_both is one choice for all layers")
            for dimension, split in unit.form.splits.items():
                first = splits.setdefault(dimension, split)
                if first != split:
                    raise ValueError(
                        f"{path} splits {dimension} as {tuple(split)} and another layer as {tuple(first)}: {_ONE_SPLIT}"
                    )
        return {**super().options(units), "decompose_both": both, "decompose_factor": _factor(splits)}


def _first(layer: FileLayer) -> tuple[tuple[int, int], int]:
    """Shape of w1, and its rank; 0 where it is full."""
    if "lokr_w1" in layer.tensors:
        return _matrix("lokr_w1", layer.tensors["lokr_w1"]), 0
    a, b = layer.need("lokr_w1_a", "lokr_w1_b")
    (rows, r), (also_r, columns) = _matrix("lokr_w1_a", a), _matrix("lokr_w1_b", b)
    if r != also_r:
        raise ValueError(f"lokr_w1_a is {tuple(a.shape)} and lokr_w1_b {tuple(b.shape)}, which cannot be multiplied")
    return (rows, columns), r


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2 or not tensor.numel():
        raise ValueError(f"{name} is {tuple(tensor.shape)}, and has to be a matrix")
    return tensor.shape[0], tensor.shape[1]


def _second(layer: FileLayer, rows: int, columns: int) -> tuple[dict[str, Tensor], int]:
    """The tensors of w2 (rows, columns, *kernel), and its rank; 0 where it is full."""
    if "lokr_w2" in layer.tensors:
        return {"lokr_w2": layer.shaped("lokr_w2", rows, columns, *layer.kernel)}, 0
    r = layer.rows("lokr_w2_b")
    if "lokr_t2" in layer.tensors:
        factors = {"lokr_w2_a": layer.shaped("lokr_w2_a", r, rows), "lokr_w2_b": layer.shaped("lokr_w2_b", r, columns)}
        return {**factors, "lokr_t2": layer.kernel_factor("lokr_t2", r)}, r
    flat = columns * math.prod(layer.kernel)
    return {"lokr_w2_a": layer.shaped("lokr_w2_a", rows, r), "lokr_w2_b": layer.shaped("lokr_w2_b", r, flat)}, r


def _factor(splits: Mapping[int, Split]) -> int:
    """The `decompose_factor` that splits each dimension so.

    Raises:
        ValueError: there is none.
    """
    for factor in _candidates(splits.values()):
        if all(factorization(dimension, factor) == split for dimension, split in splits.items()):
            return factor
    listed = ", ".join(f"{dimension} = {split.first} x {split.second}" for dimension, split in sorted(splits.items()))
    raise ValueError(
        f"no decompose_factor splits the dimensions as the file does ({listed}): PEFT's puts itself first where it "
        "divides a dimension, LyCORIS' the smaller part"
    )


def _candidates(splits: Iterable[Split]) -> list[int]:
    firsts = sorted({split.first for split in splits})
    # A dimension that the factor divides has it as its first part; past the largest, all are split near the square.
    return [-1, *firsts, *range(1, 2 * firsts[-1] + 1)]
