"""What merging makes of a layer, and what it says of where the weights came from and how exact they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base import BaseWeight

ORIGINAL, DENSE = "original weights", "dense weights"


def dequantized(base: type[BaseWeight]) -> str:
    """What a report calls the source of a weight that was dequantised."""
    return f"dequantised {base.name} weights"


@dataclass
class MergeReport:
    """Where merged weights came from, and how far they are from the exact ones.

    Attributes:
        sources: layer path -> `ORIGINAL`, `DENSE` or `dequantized(kind)`.
        errors: layer path -> relative error (Frobenius norm) of the stored weight. Over `DENSE` and `ORIGINAL` it is
            the rounding to the stored dtype, measured; over a dequantised weight it is the error of the quantisation,
            estimated from the scales (see `BaseWeight.quantization_error`).
    """

    sources: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line a source: how many layers, and their largest error."""
        lines = []
        others = sorted(set(self.sources.values()) - {DENSE, ORIGINAL})
        for source in (DENSE, ORIGINAL, *others):
            paths = [path for path, of in self.sources.items() if of == source]
            if paths:
                largest = max(self.errors[path] for path in paths)
                how = "estimated" if source in others else "measured"
                lines.append(f"{len(paths)} layers merged from {source}: relative error at most {largest:.2e} ({how})")
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
        dtype: what the weight is stored in.
    """

    path: str
    layer: Any
    base: type[BaseWeight]
    matrix: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def plain(self) -> dict[str, Tensor]:
        """The parameters of the plain layer that have changed, by attribute."""
        plain = self.base.plain(self.layer, self.stored())
        return plain if self.bias is None else {**plain, "bias": self.bias.to(self.layer.bias.dtype)}

    def stored(self) -> Tensor:
        """`matrix` in the dtype it is stored in."""
        return self.matrix.to(self.dtype)

    def check_finite(self) -> None:
        """Refuse a NaN or an infinity, also one that comes from rounding to the stored dtype."""
        for values in (self.matrix, self.bias):
            if values is not None and not bool(torch.isfinite(values.to(self.dtype)).all()):
                raise ValueError(
                    f"merging would put a NaN or an infinity into {self.path} ({self.dtype}); the model is unchanged. "
                    "Look for a NaN in the adapter's weights, or a scaling too large for the dtype"
                )

    def rounding_error(self) -> float:
        """The relative error (Frobenius norm) that storing the weight in its dtype makes."""
        norm = self.matrix.norm()
        stored = self.stored().to(self.matrix.dtype)
        return 0.0 if norm == 0 else float((stored - self.matrix).norm() / norm)
