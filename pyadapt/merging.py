"""Folding adapters into the weights they adapt, with every result checked before anything is changed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .base import BaseWeight, base_of
from .base.kind import is_conv1d
from .files import Path
from .layer import AdaptedLayer, SavedModule, adapted_layers, base_modules, restore_layer
from .method import AdapterUnit
from .originals import OriginalWeights

logger = logging.getLogger("pyadapt")

ORIGINAL, DEQUANTIZED, DENSE = "original weights", "dequantised int8 weights", "dense weights"


@dataclass
class MergeReport:
    """Where merged weights came from, and how far they are from the exact ones.

    Attributes:
        sources: layer path -> `ORIGINAL`, `DEQUANTIZED` or `DENSE`.
        errors: layer path -> relative error (Frobenius norm) of the stored weight. Over `DENSE` and `ORIGINAL` it is
            the rounding to the stored dtype, measured; over `DEQUANTIZED` it is the error of the quantisation,
            estimated from the scales (uniform rounding: scale / sqrt(12) an element).
    """

    sources: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line a source: how many layers, and their largest error."""
        lines = []
        for source in (DENSE, ORIGINAL, DEQUANTIZED):
            paths = [path for path, of in self.sources.items() if of == source]
            if paths:
                largest = max(self.errors[path] for path in paths)
                kind = "estimated" if source == DEQUANTIZED else "measured"
                lines.append(f"{len(paths)} layers merged from {source}: relative error at most {largest:.2e} ({kind})")
        return "\n".join(lines) or "no layers merged"


@dataclass(frozen=True)
class MergedLayer:
    """A layer's weights with adapters folded in.

    Attributes:
        path: dotted path in the model.
        layer: the layer itself.
        base: the kind of its frozen weight.
        matrix: the merged weight, as `BaseWeight.matrix` shapes it.
        bias: the merged bias, or None where the adapters leave the layer's own.
    """

    path: str
    layer: Any
    base: type[BaseWeight]
    matrix: Tensor
    bias: Tensor | None

    def plain(self) -> dict[str, Tensor]:
        """The parameters of the plain layer that have changed, by attribute."""
        plain = self.base.plain(self.layer, self.matrix)
        return plain if self.bias is None else {**plain, "bias": self.bias.to(self.layer.bias.dtype)}

    def check_finite(self) -> None:
        """Refuse a NaN or an infinity, also one that comes from rounding to the stored dtype."""
        dtype = self.base.dtype(self.layer)
        for values in (self.matrix, self.bias):
            if values is not None and not bool(torch.isfinite(values.to(dtype)).all()):
                raise ValueError(
                    f"merging would put a NaN or an infinity into {self.path} ({dtype}); the model is unchanged. "
                    "Look for a NaN in the adapter's weights, or a scaling too large for the dtype"
                )

    def rounding_error(self) -> float:
        """The relative error (Frobenius norm) that storing the weight in its dtype makes."""
        norm = self.matrix.norm()
        stored = self.matrix.to(self.base.dtype(self.layer)).to(self.matrix.dtype)
        return 0.0 if norm == 0 else float((stored - self.matrix).norm() / norm)


def merge_in_place(model: nn.Module, names: Sequence[str]) -> None:
    """Fold the named adapters into their layers' own storage, keeping the old weights so that unmerging is exact.

    Raises:
        ValueError: a merged weight would hold a NaN or an infinity; nothing was changed.
    """
    for merged in _merged_in_place(model, names):
        merged.check_finite()
    for merged in _merged_in_place(model, names):
        layer = merged.layer
        layer.unmerged = {name: value.detach().clone() for name, value in _replaced(layer, merged.bias).items()}
        layer.base.assign(layer, merged.matrix)
        _assign_bias(layer, merged.bias)


def unmerge_in_place(model: nn.Module) -> None:
    """Put back, bit for bit, the weights from before `merge_in_place`."""
    for _, layer in adapted_layers(model):
        if layer.unmerged is not None:
            with torch.no_grad():
                for name, value in layer.unmerged.items():
                    getattr(layer, name).copy_(value)
            layer.unmerged = None


def merged_weights(
    model: nn.Module, names: Sequence[str], original: Path | None, report: MergeReport
) -> Iterator[MergedLayer]:
    """Each layer that an adapter or a quantiser has changed, with its merged weight.

    Args:
        model: a wrapped model.
        names: the adapters to fold in.
        original: a checkpoint to take the weights of quantised layers from; by default they are dequantised.
        report: filled in as layers pass.
    """
    originals = OriginalWeights(original, model) if original is not None else None
    for path, layer in list(base_modules(model)):
        base = base_of(layer)
        units = _units(layer, names)
        if base is None or not (units or base.quantized):
            continue
        if base.quantized and originals is not None:
            source, matrix = ORIGINAL, _original_matrix(originals, path, layer, base)
        else:
            source, matrix = DEQUANTIZED if base.quantized else DENSE, base.matrix(layer)
        merged = _fold(path, layer, base, matrix, units)
        merged.check_finite()
        report.sources[path] = source
        report.errors[path] = base.quantization_error(layer) if source == DEQUANTIZED else merged.rounding_error()
        yield merged


def merge_to_plain(model: nn.Module, names: Sequence[str], original: Path | None) -> MergeReport:
    """Fold the named adapters in and make every layer that was adapted or quantised a plain dense one.

    Args:
        model: a wrapped model.
        names: the adapters to fold in.
        original: see `merged_weights`.

    Raises:
        ValueError: a merged weight would hold a NaN or an infinity; nothing was changed.
    """
    for _ in merged_weights(model, names, original, MergeReport()):
        pass
    report = MergeReport()
    for merged in merged_weights(model, names, original, report):
        if isinstance(merged.layer, AdaptedLayer):
            restore_layer(merged.layer)
        merged.base.make_dense(merged.layer, merged.matrix)
        _assign_bias(merged.layer, merged.bias)
    logger.info("%s", report)
    return report


def take_over(model: nn.Module, module: SavedModule, trained: nn.Module) -> None:
    """Write a trained copy's values into the module that it was made of.

    A weight that other modules of `model` read as well (an output head tied to the embedding) is left to them: the
    module gets one of its own.
    """
    readers = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    with torch.no_grad():
        for name, value in trained.state_dict().items():
            path, _, attribute = name.rpartition(".")
            owner = module.get_submodule(path)
            own = getattr(owner, attribute)
            if readers[id(own)] > 1:
                setattr(owner, attribute, nn.Parameter(value.clone(), requires_grad=own.requires_grad))
            else:
                own.copy_(value)


def _merged_in_place(model: nn.Module, names: Sequence[str]) -> Iterator[MergedLayer]:
    for path, layer in adapted_layers(model):
        units = _units(layer, names)
        if units:
            yield _fold(path, layer, layer.base, layer.base.matrix(layer), units)


def _units(layer: nn.Module, names: Sequence[str]) -> list[AdapterUnit]:
    if not isinstance(layer, AdaptedLayer):
        return []
    return [unit for name in names if (unit := layer.unit(name)) is not None]


def _fold(path: str, layer: Any, base: type[BaseWeight], matrix: Tensor, units: Sequence[AdapterUnit]) -> MergedLayer:
    bias = getattr(layer, "bias", None)
    before = None if bias is None else bias.detach().to(matrix.dtype, copy=True)
    after = before
    for unit in units:
        matrix, after = unit.fold(matrix, after)
    return MergedLayer(path, layer, base, matrix, None if after is before else after)


def _replaced(layer: Any, bias: Tensor | None) -> dict[str, Tensor]:
    """What of the layer a merge writes over, by attribute."""
    stored: dict[str, Tensor] = dict(layer.base.stored(layer))
    return stored if bias is None else {**stored, "bias": layer.bias}


def _assign_bias(layer: Any, bias: Tensor | None) -> None:
    if bias is not None:
        with torch.no_grad():
            layer.bias.copy_(bias)


def _original_matrix(originals: OriginalWeights, path: str, layer: nn.Module, base: type[BaseWeight]) -> Tensor:
    """The weight from before quantisation as a new (N, K) tensor, at least as wide as fp32."""
    n, k = base.shape(layer)
    transposed = is_conv1d(layer)
    plain = originals.read(path, torch.Size((k, n) if transposed else (n, k)))
    wide = torch.promote_types(base.dtype(layer), torch.float32)
    return (plain.t() if transposed else plain).to(wide, copy=True)
