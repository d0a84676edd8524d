"""BLOOM's attention, with ALiBi: a bias that grows with the position of the key.

Its products are in the midst of its forward, which is therefore written once more here for calls with units.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..surgery import original_class
from .attending import AttentionCall, RewrittenAttention
from .attention import OwnAttention, register
from .cache import cache_among


class AdaptedBloomAttention(RewrittenAttention):
    """Mixin of `BloomAttention`."""

    def attention(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        **further: Any,
    ) -> tuple[Tensor, Any]:
        """See `RewrittenAttention.attention`."""
        this: Any = self
        query, key, value = this._reshape(this.query_key_value(hidden_states))
        cache = cache_among(further)
        if cache is not None:
            key, value = cache.update(key, value, this.layer_idx)
        # (B H, 1, K) -> (B, H, 1, K)
        bias = alibi.view(-1, this.num_heads, 1, alibi.shape[-1])
        options = {"scaling": this.inv_norm_factor}
        context, weights = self.lead(
            lambda call: self._core(call, bias), AttentionCall(query, key, value, attention_mask, options)
        )
        output = F.dropout(this.dense(context.flatten(2)), this.hidden_dropout, self.training)
        # While keys and values of a prompt are asked for, the residual is that of the text.
        return (output + residual if output.shape == residual.shape else output), weights

    def _core(self, call: AttentionCall, bias: Tensor) -> tuple[Tensor, Tensor]:
        this: Any = self
        scores = torch.matmul(call.query, call.key.transpose(-1, -2)) * this.inv_norm_factor
        before = scores.shape[-1] - bias.shape[-1]
        if before:
            # Positions before the text are negative; a shift of all of them changes no softmax.
            steps = torch.arange(-before, 0, device=bias.device).to(bias.dtype)
            first = slopes(this.num_heads).to(bias)[:, None, None] * steps
            bias = torch.cat([first.expand(bias.shape[0], -1, -1, -1), bias], dim=-1)
        scores = scores + bias
        if call.mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~call.mask, lowest) if call.mask.dtype == torch.bool else scores + call.mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(call.query.dtype)
        weights = this.attention_dropout(weights)
        return torch.matmul(weights, call.value).transpose(1, 2), weights


def slopes(heads: int) -> Tensor:
    """The slope of each head, (H,) fp32: powers of two, then every other of the next power's (Press et al. 2021)."""
    whole = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    rest = [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return torch.tensor(first + rest)


@register
class BloomAttention(OwnAttention):
    """`BloomAttention`."""

    mixin: ClassVar[type[nn.Module] | None] = AdaptedBloomAttention

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return original_class(layer).__name__ == "BloomAttention"

    @staticmethod
    def is_causal(layer: Any) -> bool:
        """See `Attention.is_causal`."""
        return True

    @classmethod
    def check(cls, layer: Any) -> None:
        """See `Attention.check`."""
        if layer.pretraining_tp > 1 and layer.slow_but_exact:
            raise ValueError("config.slow_but_exact multiplies BLOOM's attention in slices; set it to False")
