"""DeBERTa's disentangled attention, in both versions: scores from contents and relative positions together.

Keys that a unit puts before the text are tokens at the positions before it, in the terms of relative position as well:
the module's own method makes these, for a sequence that is longer by them. The forward is written once more here for
calls with units, since its products are in its midst.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..surgery import original_class
from .attending import AttentionCall, RewrittenAttention
from .attention import OwnAttention, register


class AdaptedDebertaAttention(RewrittenAttention):
    """Mixin of DeBERTa's `DisentangledSelfAttention`, (B, H, L, D) inside."""

    def attention(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `RewrittenAttention.attention`."""
        query, key, value = self._projections(hidden_states, query_states)
        # Where the encoder gives no distances there is no term of relative position.
        relative = rel_embeddings if relative_pos is not None else None

        def core(call: AttentionCall) -> tuple[Tensor, Tensor]:
            return self._core(call, relative)

        call = AttentionCall(query, key, value, attention_mask.bool(), {})
        context, weights = self.lead(core, call)
        return context.flatten(2), (weights if output_attentions else None)

    def _projections(self, states: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        this: Any = self
        if queries is not None:
            raise ValueError("an adapter of attention needs DeBERTa's queries from its own states: no query_states")
        query, key, value = this.transpose_for_scores(this.in_proj(states)).chunk(3, dim=-1)
        return (
            query + this.transpose_for_scores(this.q_bias[None, None, :]),
            key,
            value + this.transpose_for_scores(this.v_bias[None, None, :]),
        )

    def _core(self, call: AttentionCall, relative: Tensor | None) -> tuple[Tensor, Tensor]:
        this: Any = self
        before = call.key.shape[2] - call.query.shape[2]
        factor = 1 + len(this.pos_att_type)
        # As many queries as keys, so that relative positions are those of one sequence.
        longer = torch.cat([call.query.new_zeros(*call.query.shape[:2], before, call.query.shape[3]), call.query], 2)
        scores = self._scores(longer, call.key, relative, factor)[:, :, before:]
        if getattr(this, "head_logits_proj", None) is not None:
            scores = this.head_logits_proj(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert call.mask is not None
        weights = torch.softmax(scores.masked_fill(~call.mask, torch.finfo(scores.dtype).min), dim=-1)
        weights = this.dropout(weights)
        if getattr(this, "head_weights_proj", None) is not None:
            weights = this.head_weights_proj(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return torch.matmul(weights, call.value).transpose(1, 2), weights

    def _scores(self, query: Tensor, key: Tensor, relative: Tensor | None, factor: int) -> Tensor:
        this: Any = self
        query = query / (query.shape[-1] * factor) ** 0.5
        scores = torch.matmul(query, key.transpose(-1, -2))
        if this.relative_attention and relative is not None:
            positions = torch.arange(key.shape[2], device=key.device)
            distances = (positions[:, None] - positions[None, :])[None]
            scores = scores + this.disentangled_att_bias(query, key, distances, this.pos_dropout(relative), factor)
        return scores


class AdaptedDebertaV2Attention(AdaptedDebertaAttention):
    """Mixin of DeBERTa-v2's, whose own methods work on (B H, L, D)."""

    def _projections(self, states: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        this: Any = self
        source = states if queries is None else queries
        projected = (this.query_proj(source), this.key_proj(states), this.value_proj(states))
        query, key, value = (x.unflatten(-1, (this.num_attention_heads, -1)).transpose(1, 2) for x in projected)
        return query, key, value

    def _scores(self, query: Tensor, key: Tensor, relative: Tensor | None, factor: int) -> Tensor:
        this: Any = self
        scores = torch.matmul(query, key.transpose(-1, -2) / (query.shape[-1] * factor) ** 0.5)
        if this.relative_attention:
            flat = query.flatten(0, 1), key.flatten(0, 1)
            bias = this.disentangled_attention_bias(*flat, None, this.pos_dropout(relative), factor)
            # Without a kind of term in `pos_att_type` it is the number 0.
            scores = scores + bias.view_as(scores) if isinstance(bias, Tensor) else scores
        return scores


@register
class DebertaAttention(OwnAttention):
    """`DisentangledSelfAttention` of DeBERTa."""

    mixin: ClassVar[type[nn.Module] | None] = AdaptedDebertaAttention

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return original_class(layer).__name__ == "DisentangledSelfAttention" and hasattr(layer, "in_proj")


@register
class DebertaV2Attention(OwnAttention):
    """`DisentangledSelfAttention` of DeBERTa-v2."""

    mixin: ClassVar[type[nn.Module] | None] = AdaptedDebertaV2Attention

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return original_class(layer).__name__ == "DisentangledSelfAttention" and hasattr(layer, "query_proj")
