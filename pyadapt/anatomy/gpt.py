"""GPT-Neo's attention, and GPT-J's till transformers 5.23, whose products are a method of their own, `_attn`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..surgery import original_class
from .attending import AdaptedAttention, AttentionCall
from .attention import Attention, OwnAttention, register


class AdaptedGPTAttention(AdaptedAttention):
    """Mixin of an attention with a method `_attn(query, key, value, mask)`, which gives (B, H, L, D) and weights."""

    # What GPT-Neo multiplies its scores by.
    scaling = 1.0

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        own = super()._attn  # type: ignore[misc]
        if self.at_work is None:
            return own(query, key, value, attention_mask)

        def core(call: AttentionCall) -> tuple[Tensor, Any]:
            output, weights = own(call.query, call.key, call.value, call.mask)
            return output.transpose(1, 2), weights

        options = {"scaling": self.scaling}
        output, weights = self.lead(core, AttentionCall(query, key, value, attention_mask, options))
        return output.transpose(1, 2), weights


class AdaptedGPTJAttention(AdaptedGPTAttention):
    """Mixin of GPT-J's with `_attn`, which rotates by `position_ids` itself."""

    @property
    def scaling(self) -> float:  # type: ignore[override]
        """What the scores are multiplied by."""
        return 1.0 / float(self.scale_attn)  # type: ignore[arg-type]

    def with_units(self, units: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `AdaptedAttention.with_units`; the text comes after what units put before it."""
        before = sum(unit.before for unit in units)
        return super().with_units(units, args, {**kwargs, "position_ids": kwargs["position_ids"] + before})


class RotatedGPTJAttention(AdaptedAttention):
    """Mixin of GPT-J's without `_attn`, which is given sines before cosines."""

    no_rotation: ClassVar[tuple[float, float]] = (0.0, 1.0)


@register
class GPTNeoAttention(OwnAttention):
    """`GPTNeoSelfAttention`; a prefix counts as tokens before the text also to its local layers."""

    mixin: ClassVar[type[nn.Module] | None] = AdaptedGPTAttention

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return original_class(layer).__name__ == "GPTNeoSelfAttention"


@register
class GPTJAttention(OwnAttention):
    """`GPTJAttention` till transformers 5.23."""

    mixin: ClassVar[type[nn.Module] | None] = AdaptedGPTJAttention

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return original_class(layer).__name__ == "GPTJAttention" and hasattr(layer, "_attn")


@register
class RegisteredGPTJAttention(Attention):
    """`GPTJAttention` from transformers 5.24 on, which looks its function up in the registry."""

    mixin: ClassVar[type[nn.Module] | None] = RotatedGPTJAttention

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return original_class(layer).__name__ == "GPTJAttention" and not hasattr(layer, "_attn")


@register
class GPT2Attention(Attention):
    """`GPT2Attention`: in PEFT an adapter's own attention does not pass the output projection there."""

    adds_to_output: ClassVar[bool] = True

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return original_class(layer).__name__ == "GPT2Attention"

    @classmethod
    def check(cls, layer: Any) -> None:
        """See `Attention.check`."""
        super().check(layer)
        if layer.reorder_and_upcast_attn and layer.config._attn_implementation == "eager":
            raise ValueError(
                "config.reorder_and_upcast_attn is an eager attention of its own, to which no keys can be added; "
                "model.set_attn_implementation('sdpa') takes them"
            )
