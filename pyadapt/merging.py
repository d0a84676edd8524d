"""Folding adapters into the weights they adapt, with every result checked before anything is changed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .base import BaseWeight, base_of
from .base.kind import is_conv1d
from .files import Path
from .layer import AdaptedLayer, SavedModule, adapted_layers, base_modules, restore_layer
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


def merge_in_place(model: nn.Module, names: Sequence[str]) -> None:
    """Fold the named adapters into their layers' own storage, keeping the old weights so that unmerging is exact.

    Raises:
        ValueError: a merged weight would hold a NaN or an infinity; nothing was changed.
    """
    for path, layer, matrix in _merged_layers(model, names):
        _check_finite(path, matrix, layer.base.dtype(layer))
    for _, layer, matrix in _merged_layers(model, names):
        layer.unmerged = {name: p.detach().clone() for name, p in layer.base.stored(layer).items()}
        layer.base.assign(layer, matrix)


def unmerge_in_place(model: nn.Module) -> None:
    """Put back, bit for bit, the weights from before `merge_in_place`."""
    for _, layer in adapted_layers(model):
        if layer.unmerged is not None:
            with torch.no_grad():
                for name, parameter in layer.base.stored(layer).items():
                    parameter.copy_(layer.unmerged[name])
            layer.unmerged = None


def merged_weights(
    model: nn.Module, names: Sequence[str], original: Path | None, report: MergeReport
) -> Iterator[tuple[str, nn.Module, type[BaseWeight], Tensor]]:
    """(path, layer, kind, merged matrix (N, K)) of each layer that an adapter or a quantiser has changed.

    Args:
        model: a wrapped model.
        names: the adapters to fold in.
        original: a checkpoint to take the weights of quantised layers from; by default they are dequantised.
        report: filled in as layers pass.
    """
    originals = OriginalWeights(original, model) if original is not None else None
    for path, layer in list(base_modules(model)):
        base = base_of(layer)
        delta = layer.delta(tuple(names)) if isinstance(layer, AdaptedLayer) else None
        if base is None or (delta is None and not base.quantized):
            continue
        if base.quantized and originals is not None:
            source, matrix = ORIGINAL, _original_matrix(originals, path, layer, base)
        else:
            source, matrix = DEQUANTIZED if base.quantized else DENSE, base.matrix(layer)
        if delta is not None:
            matrix += delta
        dtype = base.dtype(layer)
        _check_finite(path, matrix, dtype)
        report.sources[path] = source
        report.errors[path] = (
            base.quantization_error(layer) if source == DEQUANTIZED else _rounding_error(matrix, dtype)
        )
        yield path, layer, base, matrix


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
    for _, layer, base, matrix in merged_weights(model, names, original, report):
        if isinstance(layer, AdaptedLayer):
            restore_layer(layer)
        base.make_dense(layer, matrix)
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


def _merged_layers(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, AdaptedLayer, Tensor]]:
    for path, layer in adapted_layers(model):
        delta = layer.delta(tuple(names))
        if delta is not None:
            yield path, layer, layer.base.matrix(layer) + delta


def _check_finite(path: str, matrix: Tensor, dtype: torch.dtype) -> None:
    if not bool(torch.isfinite(matrix.to(dtype)).all()):
        raise ValueError(
            f"merging would put a NaN or an infinity into {path} ({dtype}); the model is unchanged. "
            "Look for a NaN in the adapter's weights, or a scaling too large for the dtype"
        )


def _rounding_error(matrix: Tensor, dtype: torch.dtype) -> float:
    norm = matrix.norm()
    return 0.0 if norm == 0 else float((matrix.to(dtype).to(matrix.dtype) - matrix).norm() / norm)


def _original_matrix(originals: OriginalWeights, path: str, layer: nn.Module, base: type[BaseWeight]) -> Tensor:
    """The weight from before quantisation as a new (N, K) tensor, at least as wide as fp32."""
    n, k = base.shape(layer)
    transposed = is_conv1d(layer)
    plain = originals.read(path, torch.Size((k, n) if transposed else (n, k)))
    wide = torch.promote_types(base.dtype(layer), torch.float32)
    return (plain.t() if transposed else plain).to(wide, copy=True)
