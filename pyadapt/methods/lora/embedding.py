"""LoRA on an embedding: rows of A' are looked up as those of the table are.

    y = W[ids] + s A'[ids] B',   A (r, V), B (d, r)

A scaled embedding multiplies both terms by its factor. There is no dropout, since ids cannot be dropped from.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base import BaseWeight
from ...base.embedding import scaled_as
from ...layer import AdaptedLayer
from ...method import AdapterUnit
from .config import LoraConfig
from .tied import TiedHeadUnit
from .unit import LoraUnit, adapts


@adapts("embedding")
class EmbeddingUnit(LoraUnit):
    """LoRA on y = W[ids]."""

    file_keys: ClassVar[dict[str, str]] = TiedHeadUnit.file_keys
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    @classmethod
    def shapes(cls, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`.

        Raises:
            ValueError: `lora_bias`, for which there is no place on an embedding, nor in PEFT's files.
        """
        if config.lora_bias:
            raise ValueError("lora_bias: B of an embedding has no bias; leave the layer out, or lora_bias=False")
        return TiedHeadUnit.shapes(config, path, base, layer)

    @classmethod
    def follower(cls, form: str) -> type[AdapterUnit]:
        """See `AdapterUnit.follower`."""
        return TiedHeadUnit if form == "linear" else cls

    def initialize(self, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> None:
        """B normal and A zero whatever the method of starting, as in PEFT; `init_lora_weights=False`: both normal."""
        with torch.no_grad():
            nn.init.normal_(self.lora_embedding_B)
            if config.init_lora_weights is False:
                nn.init.normal_(self.lora_embedding_A)
            else:
                nn.init.zeros_(self.lora_embedding_A)

    def parameters_of_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """See `LoraUnit.parameters_of_factors`; A (r, V) and B (d, r), transposed against the table."""
        return self.lora_embedding_A, self.lora_embedding_B

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `LoraUnit.factors`: (r, d) and (V, r), as the table is (V, d)."""
        return self.lora_embedding_B.t(), self.lora_embedding_A.t()

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`; x holds ids, of any shape."""
        y = owner.frozen(x) if y is None else y
        return y + self.term(x, owner).to(y.dtype)

    def term(self, x: Tensor, owner: AdaptedLayer) -> Tensor:
        """What the adapter adds to the layer's output, in its own dtype."""
        rows = look_up(x, self.lora_embedding_A.t(), owner)
        return scaled_as(owner, self.scaling * F.linear(rows, self.lora_embedding_B))


def look_up(ids: Tensor, table: Tensor, owner: Any) -> Tensor:
    """Rows of `table` with the options of the embedding `owner`: padding, largest norm, gradient by frequency.

    The gradient is dense also where the layer's own would be sparse: that of a transposed table cannot be.
    """
    return F.embedding(
        ids,
        table,
        padding_idx=owner.padding_idx,
        max_norm=owner.max_norm,
        norm_type=owner.norm_type,
        scale_grad_by_freq=owner.scale_grad_by_freq,
    )
