"""AdaLoRA: low-rank adaptation that spends a falling budget of ranks on the layers that need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...config import AdapterConfig
from ...method import AdapterUnit, LayerMethod, register
from . import allocation, orthogonality
from .config import AdaLoraConfig
from .files import plain_lora, pruned
from .unit import ConvUnit, LinearUnit

__all__ = ["AdaLora", "AdaLoraConfig", "ConvUnit", "LinearUnit"]


@register
class AdaLora(LayerMethod):
    """AdaLoRA on linear layers and convolutions."""

    peft_type: ClassVar[str] = AdaLoraConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = AdaLoraConfig
    units: ClassVar[dict[str, type[AdapterUnit]]] = {"linear": LinearUnit, "conv": ConvUnit}
    has_schedule: ClassVar[bool] = True
    has_penalty: ClassVar[bool] = True
    after_step = staticmethod(allocation.update_and_allocate)
    before_call = staticmethod(orthogonality.before_call)
    penalty = staticmethod(orthogonality.penalty)

    @classmethod
    def as_saved(
        cls, model: nn.Module, name: str, config: AdaLoraConfig, tensors: dict[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """See `LayerMethod.as_saved`: without the ranks that the last allocation has taken away."""
        return pruned(model, name, config, tensors, prefix)

    @classmethod
    def as_plain_lora(
        cls, model: nn.Module, name: str, config: AdaLoraConfig, tensors: Mapping[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """See `LayerMethod.as_plain_lora`."""
        return plain_lora(model, name, config, tensors, prefix)

    @classmethod
    def combination(cls, adapters: Sequence[str], weights: Sequence[float], **how: Any) -> Any:
        """See `LayerMethod.combination`.

        Raises:
            ValueError: always, as in PEFT; the message says what to do.
        """
        raise ValueError(
            "AdaLoRA adapters cannot be combined by weight: save each with save_pretrained(folder, as_plain_lora=True) "
            "(nothing is lost by that), load them as the LoRA adapters that they are then, and combine those"
        )
