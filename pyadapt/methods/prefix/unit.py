"""The prefix of one attention: keys and values that its queries see before those of the text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...anatomy import AttentionCall, AttentionUnit, attention_of
from ...anatomy.attention import AdaptedAttention, Core

# What the MLP that makes prefixes has in common for all layers, and what each has of its own.
_SHARED = ("embedding", "hidden_weight", "hidden_bias")
_OWN = ("output_weight", "output_bias")


class PrefixUnit(AttentionUnit):
    """Attention over [K_p; K] and [V_p; V], with n keys and values of its own before those of the text.

        K_p, V_p = the two halves of P                        plain, or finished
        P = tanh(E W1' + b1) W2' + b2                         prefix_projection

    The text's positions count on from n, and a window that slides counts the prefix as tokens before the text; the
    keys of the prefix bear no rotation (as in PEFT). Source: Li and Liang 2021; Liu et al. 2022 (P-Tuning v2).

    Attributes:
        prefix: P, (n, 2 key/value heads D).
        embedding: E, (n, token_dim).
        hidden_weight, hidden_bias: W1 (hidden, token_dim), b1; with E, those of the first layer serve all.
        output_weight, output_bias: W2 (2 key/value heads D, hidden), b2.
    """

    file_keys: ClassVar[dict[str, str]] = {
        "prefix": "prompt_embeddings",
        **{name: f"prefix_projection.{name}" for name in (*_SHARED, *_OWN)},
    }
    common: ClassVar[tuple[str, ...]] = _SHARED
    writes_mirror: ClassVar[bool] = False
    hidden_weight: nn.Parameter
    output_weight: nn.Parameter

    def __init__(self, config: Any, path: str, base: Any, layer: Any, *rest: Any) -> None:
        super().__init__(config, path, base, layer, *rest)
        self.before = int(config.num_virtual_tokens)
        self.heads = base.heads(layer)[0]

    @classmethod
    def shapes(cls, config: Any, path: str, base: Any, layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        n, hidden = config.num_virtual_tokens, config.encoder_hidden_size
        width = 2 * base.shape(layer)[0]
        if config.finished or not config.prefix_projection:
            return {"prefix": (n, width)}
        return {
            "embedding": (n, config.token_dim),
            "hidden_weight": (hidden, config.token_dim),
            "hidden_bias": (hidden,),
            "output_weight": (width, hidden),
            "output_bias": (width,),
        }

    def initialize(self, config: Any, path: str, base: Any, layer: Any) -> None:
        """N(0, 1) for a prefix and for embeddings, and what torch gives linear layers; see `init_weights`."""
        for attribute, value in self.named_parameters(recurse=False):
            if attribute in ("prefix", "embedding"):
                nn.init.normal_(value)
            else:
                inputs = self.output_weight if attribute in _OWN else self.hidden_weight
                nn.init.uniform_(value, -1 / math.sqrt(inputs.shape[1]), 1 / math.sqrt(inputs.shape[1]))
            if config.init_weights == "zero" and attribute in ("prefix", *_OWN):
                nn.init.zeros_(value)

    @staticmethod
    def made(weights: Mapping[str, Tensor]) -> Tensor:
        """P, (n, 2 key/value heads D), from the parameters of a unit."""
        if "prefix" in weights:
            return weights["prefix"]
        hidden = torch.tanh(F.linear(weights["embedding"], weights["hidden_weight"], weights["hidden_bias"]))
        return F.linear(hidden, weights["output_weight"], weights["output_bias"])

    def forward(self, owner: AdaptedAttention, core: Core, call: AttentionCall) -> tuple[Tensor, Any]:  # type: ignore[override]
        """See `AttentionUnit.forward`."""
        prefix = self.made(dict(self.named_parameters(recurse=False))).to(call.key.dtype)
        # (n, 2 heads D) -> 2 x (1, heads, n, D)
        key, value = prefix.unflatten(1, (2, self.heads, -1)).permute(1, 2, 0, 3).unsqueeze(1)
        rows = call.key.shape[0]
        return core(
            call.changed(
                key=torch.cat([key.expand(rows, -1, -1, -1), call.key], dim=2),
                value=torch.cat([value.expand(rows, -1, -1, -1), call.value], dim=2),
                mask=self._mask(call),
            )
        )

    def _mask(self, call: AttentionCall) -> Tensor | None:
        """The mask with n columns more, on the left; None where all may be seen and transformers' None means so."""
        queries, keys, n = call.query.shape[2], call.key.shape[2], self.before
        window = self._window(call)
        mask = call.mask
        if mask is None and queries > 1 and call.causal:
            # None would stand for a triangle from the first column on.
            rows = torch.arange(queries, device=call.query.device)
            mask = (rows[:, None] >= torch.arange(keys, device=call.query.device))[None, None]
        if mask is None and window is not None:
            mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=call.query.device)
        if mask is None:
            return None
        if window is None:
            before = torch.ones(n, dtype=torch.bool, device=mask.device).expand(*mask.shape[:-1], n)
        else:
            mask = mask.expand(*mask.shape[:2], queries, mask.shape[3])
            before = window.to(mask.device).expand(*mask.shape[:-1], n)
        if mask.dtype != torch.bool:
            before = torch.zeros_like(before, dtype=mask.dtype).masked_fill(~before, torch.finfo(mask.dtype).min)
        return torch.cat([before, mask], dim=-1)

    def _window(self, call: AttentionCall) -> Tensor | None:
        """(queries, n), which of the prefix a window that slides lets each query see; None where it is all."""
        width = call.options.get("sliding_window")
        if width is None:
            return None
        positions = self.before + call.seen + torch.arange(call.query.shape[2], device=call.query.device)
        return positions[:, None] - torch.arange(self.before, device=call.query.device) < width

    @classmethod
    def route(cls, config: Any, path: str, base: Any, layer: Any, tokens: int) -> str:
        """See `AdapterUnit.route`."""
        return str(getattr(getattr(layer, "config", None), "_attn_implementation", None) or "torch")

    def extra_repr(self) -> str:
        """The length, for `print(model)`."""
        return f"virtual_tokens={self.before}"


def widths(model: nn.Module, paths: list[str]) -> list[int]:
    """Features that each of the attentions at `paths` has in a finished prefix."""
    kinds = [(attention_of(layer), layer) for layer in map(model.get_submodule, paths)]
    return [2 * kind.shape(layer)[0] for kind, layer in kinds if kind is not None]
