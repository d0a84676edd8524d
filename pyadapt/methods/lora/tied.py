"""LoRA on the output head that shares its weight with an embedding: the embedding's A and B, transposed.

y = x W' + b + s drop(x) B A,   A (r, V) and B (d, r) of the embedding, W (V, d)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...base import BaseWeight
from .config import LoraConfig
from .unit import LinearUnit


class TiedHeadUnit(LinearUnit):
    """A `LinearUnit` with lora_A = B' and lora_B = A' of the embedding's unit, whose parameters these are."""

    file_keys: ClassVar[dict[str, str]] = {
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
    }
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    @classmethod
    def shapes(cls, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        r, (vocabulary, features) = config.rank_of(path), base.shape(layer)
        return {"lora_embedding_A": (r, vocabulary), "lora_embedding_B": (features, r)}

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """(r, d)."""
        return self.lora_embedding_B.t()

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """(V, r)."""
        return self.lora_embedding_A.t()

    @classmethod
    def mirrored(cls, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `AdapterUnit.mirrored`: under the keys of a linear layer, as PEFT writes them."""
        return {"lora_A.weight": values["lora_embedding_B"].t(), "lora_B.weight": values["lora_embedding_A"].t()}
