"""Prefix tuning: keys and values before those of the text, in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...anatomy import (
    Blocks,
    Positions,
    PositionUnit,
    attention_of,
    blocks_of,
    decoder_of,
    position_modules,
    saying,
    self_attentions,
)
from ...base import Host
from ...config import AdapterConfig
from ...method import AdapterUnit, register
from ...prompt_learning import PROMPT_KEY, PromptMethod, check_length
from .config import PrefixTuningConfig
from .unit import PrefixReader, PrefixUnit

__all__ = ["PrefixReader", "PrefixTuning", "PrefixTuningConfig", "PrefixUnit"]


@register
class PrefixTuning(PromptMethod):
    """Prefix tuning of decoders, of the decoders behind encoders, and of encoders."""

    peft_type: ClassVar[str] = PrefixTuningConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = PrefixTuningConfig
    units: ClassVar[dict[str, type[AdapterUnit]]] = {
        "blocks": PrefixUnit,
        "attention": PrefixReader,
        "positions": PositionUnit,
    }

    @classmethod
    def host(cls, layer: nn.Module) -> type[Host] | None:
        """See `LayerMethod.host`."""
        kinds: list[type[Host]] = [Positions, Blocks]
        return attention_of(layer) or next((kind for kind in kinds if kind.accepts(layer)), None)

    @staticmethod
    def places(config: Any, model: nn.Module) -> tuple[Any, list[str]]:
        """See `LayerMethod.places`: where the blocks are run, self-attentions, what makes positions for them."""
        config = config.with_saved(model)
        inside = decoder_of(model)
        part = model.get_submodule(inside or "")
        heads = {}
        for path, layer, kind in self_attentions(part, inside or ""):
            with saying(path):
                kind.check(layer)
                heads[path] = kind.heads(layer)
        if not heads:
            raise ValueError(
                f"this {type(model).__name__} has no self-attention of transformers, so there is nothing that could "
                "see a prefix"
            )
        moved = position_modules(part, inside or "")
        check_length(config, moved)
        return _completed(config, model, list(heads.values())), [blocks_of(model, list(heads)), *heads, *dict(moved)]

    @classmethod
    def finish(cls, unit: AdapterUnit, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PromptMethod.finish`."""
        return {PROMPT_KEY: PrefixUnit.made(tensors)}


def _completed(config: Any, model: nn.Module, heads: list[tuple[int, int]]) -> Any:
    """A copy of `config` that says everything outright, for attentions with these heads of these sizes.

    Raises:
        ValueError: an option does not fit the model.
    """
    name, both = type(model).__name__, decoder_of(model) is not None
    if config.num_layers not in (None, len(heads)):
        raise ValueError(
            f"num_layers={config.num_layers}: this {name} has {len(heads)} self-attentions, and a prefix for each; "
            "leave the option out"
        )
    if config.num_transformer_submodules == 2 and not both:
        raise ValueError(f"num_transformer_submodules=2: this {name} is no encoder with a decoder")
    width = heads[0][0] * heads[0][1]
    # Whoever says it outright may mean the states' width, as in PEFT, where fewer key/value heads then make it less.
    states = getattr(getattr(model, "config", None), "hidden_size", width)
    if config.token_dim not in (None, width, states):
        raise ValueError(
            f"token_dim={config.token_dim}: keys of this {name} have {width} features; leave the option out"
        )
    return config.replaced(
        num_layers=len(heads),
        token_dim=width,
        num_attention_heads=heads[0][0],
        num_transformer_submodules=config.num_transformer_submodules or (2 if both else 1),
        encoder_hidden_size=config.encoder_hidden_size or width,
        widths=[2 * count * size for count, size in heads],
    )
