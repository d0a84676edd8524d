"""IA3 as LyCORIS writes it: l - 1, and whether it is of the layer's input.

An output is scaled before the bias is added, where IA3 here (as in PEFT and its paper) scales the bias too: on a layer
with a bias the two are different functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ...config import AdapterConfig
from ...kohya.reader import FileLayer, FileUnit, Reader, exactly, number, register, wide
from .config import IA3Config


@register
class IA3Reader(Reader):
    """Reads IA3 of inputs, and of outputs of layers without a bias."""

    config_class: ClassVar[type[AdapterConfig]] = IA3Config
    marks: ClassVar[frozenset[str]] = frozenset({"on_input"})
    keys: ClassVar[frozenset[str]] = marks | {"weight"}

    @classmethod
    def read(cls, layer: FileLayer) -> FileUnit:
        """See `Reader.read`."""
        weight, on_input = layer.need("weight", "on_input")
        of_input = bool(number("on_input", on_input))
        if not of_input and layer.layer.bias is not None:
            raise ValueError("LyCORIS' IA3 of an output leaves the layer's bias alone, which IA3 here scales too")
        (N, K), kernel = layer.base.shape(layer.layer), layer.kernel
        size = (layer.layer.in_channels if kernel else K) if of_input else N
        if weight.numel() != size:
            raise ValueError(f"weight is {tuple(weight.shape)}, and the layer has {size} features there")
        rows = size if not (kernel or of_input) else 1
        l = (wide(weight) + 1).reshape(rows, size // rows, *(1 for _ in kernel))
        return FileUnit({"ia3_l": l}, form=of_input)

    @classmethod
    def config(cls, units: Mapping[str, FileUnit], targets: list[str] | str) -> IA3Config:
        """See `Reader.config`."""
        inputs = [path for path, unit in units.items() if unit.form]
        named = inputs if isinstance(targets, list) or not inputs else exactly(inputs)
        return IA3Config(target_modules=targets, feedforward_modules=named)
