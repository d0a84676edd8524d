"""T5's attention: a bias by relative position, made by the first layer of a stack and handed on to the others."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..surgery import original_class
from .attending import AdaptedAttention
from .attention import Attention, register


class AdaptedT5Attention(AdaptedAttention):
    """Mixin of T5's attention: its bias counts the keys that units put before the text as tokens before it."""

    def compute_bias(self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0) -> Tensor:
        """(1, H, L, n + K): T5's own, of the longer sequence."""
        before = 0 if self.at_work is None else sum(unit.before for unit in self.at_work.units)
        own: Any = super()
        return own.compute_bias(query_length, before + key_length, device, past_seen_tokens + before)


@register
class T5Attention(Attention):
    """`T5Attention` and its copies (mT5, UMT5, ...)."""

    mixin: ClassVar[type[nn.Module] | None] = AdaptedT5Attention

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return hasattr(original_class(layer), "compute_bias") and Attention.accepts(layer)
