"""LLaMA-Adapter: gated prompts in the top attentions of a decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ...anatomy import attention_of, decoder_of, saying, self_attentions
from ...base import Host
from ...config import AdapterConfig
from ...method import AdapterUnit, LayerMethod, register
from ...targets import matches, modules_to_save
from .config import AdaptionPromptConfig
from .unit import AdaptionPromptUnit

__all__ = ["AdaptionPrompt", "AdaptionPromptConfig", "AdaptionPromptUnit"]


@register
class AdaptionPrompt(LayerMethod):
    """LLaMA-Adapter, on any decoder whose attention is known."""

    peft_type: ClassVar[str] = AdaptionPromptConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = AdaptionPromptConfig
    units: ClassVar[dict[str, type[AdapterUnit]]] = {"attention": AdaptionPromptUnit}

    @classmethod
    def host(cls, layer: nn.Module) -> type[Host] | None:
        """See `LayerMethod.host`."""
        return attention_of(layer)

    @staticmethod
    def places(config: Any, model: nn.Module) -> tuple[Any, list[str]]:
        """See `LayerMethod.places`: the top `adapter_layers` self-attentions of the decoder."""
        for option in ("adapter_len", "adapter_layers"):
            if getattr(config, option) is None:
                raise ValueError(f"AdaptionPromptConfig needs {option}")
        inside = decoder_of(model) or ""
        found = self_attentions(model.get_submodule(inside), inside)
        decoding = {path: (layer, kind) for path, layer, kind in found if kind.is_causal(layer)}
        if not decoding:
            raise ValueError(
                f"LLaMA-Adapter is for decoders: no self-attention of this {type(model).__name__} says that it looks "
                "back alone"
            )
        names = sorted({path.rpartition(".")[2] for path in decoding})
        wanted = config.target_modules or names[0]
        if not isinstance(wanted, str):
            raise ValueError(f"target_modules={wanted!r}: one name is needed, that of the attentions: {names}")
        chosen = [path for path in decoding if matches([wanted], path)]
        if not chosen:
            raise ValueError(f"target_modules={wanted!r} is no attention of this model; those are called {names}")
        if config.adapter_layers > len(chosen):
            raise ValueError(f"adapter_layers={config.adapter_layers}: the model has {len(chosen)} such layers")
        chosen = chosen[-config.adapter_layers :]
        for path in chosen:
            layer, kind = decoding[path]
            with saying(path):
                kind.check(layer)
        saved = modules_to_save(config, model) or None
        return config.replaced(target_modules=wanted, modules_to_save=saved), chosen
