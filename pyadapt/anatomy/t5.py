"""T5's attention: a bias by relative position, made by the first layer of a stack and handed on to the others."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..surgery import original_class
from .attention import AdaptedAttention, Attention, register


class AdaptedT5Attention(AdaptedAttention):
    """Mixin of T5's attention: its bias counts the keys that units put before the text as tokens before it."""

    def with_units(self, units: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `AdaptedAttention.with_units`."""
        before = sum(unit.before for unit in units)
        this: Any = self
        if before and kwargs.get("position_bias") is None and this.has_relative_attention_bias:
            seen, queries = self._seen(kwargs), args[0].shape[1]
            mask = kwargs.get("mask")
            keys = queries + seen if mask is None else mask.shape[-1]
            bias = this.compute_bias(queries, before + keys, device=args[0].device, past_seen_tokens=before + seen)
            kwargs = {**kwargs, "position_bias": bias}
        return super().with_units(units, args, kwargs)


@register
class T5Attention(Attention):
    """`T5Attention` and its copies (mT5, ...)."""

    mixin: ClassVar[type[nn.Module] | None] = AdaptedT5Attention

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return hasattr(original_class(layer), "compute_bias") and Attention.accepts(layer)
