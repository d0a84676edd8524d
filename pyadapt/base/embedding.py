"""The table of a `torch.nn.Embedding` in a floating dtype, (V, d): one row a token."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..surgery import original_class
from .floating import Floating
from .kind import Operands, check_at_hand, register


@register
class Embedding(Floating):
    """`weight` (V, d): V tokens take the place of N, d features that of K."""

    name = "embedding"
    form: ClassVar[str] = "embedding"

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `BaseWeight.accepts`.

        A subclass with a forward of its own is taken if it multiplies what it looks up by its `embed_scale`
        (Gemma, BART, ...); others compute something from the ids or the rows that an adapter would have to know.
        """
        if not isinstance(layer, nn.Embedding) or not layer.weight.is_floating_point():
            return False
        own: Any = original_class(layer)
        return own.forward is nn.Embedding.forward or scale_of(layer) is not None

    @staticmethod
    def shape(layer: Any) -> tuple[int, int]:
        """See `BaseWeight.shape`; the layer's own numbers, since a sharding engine may hold an empty weight."""
        return layer.num_embeddings, layer.embedding_dim

    @staticmethod
    def operands(layer: Any) -> Operands:
        """See `BaseWeight.operands`."""
        check_at_hand(layer)
        return Operands(layer.weight, None, None)


def scale_of(layer: Any) -> float | Tensor | None:
    """What a scaled embedding multiplies its rows by, as it does it: a number or a tensor of one element; else None."""
    scale = getattr(layer, "embed_scale", None)
    if isinstance(scale, Tensor):
        # The models that hold it as a tensor (Gemma) round it to the dtype of their weight.
        return scale.to(layer.weight.dtype) if scale.numel() == 1 else None
    return scale if isinstance(scale, (int, float)) else None


def scaled_as(layer: Any, rows: Tensor) -> Tensor:
    """`rows` multiplied by the factor of `layer`, if it has one, in the dtype of `rows`."""
    scale = scale_of(layer)
    return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
