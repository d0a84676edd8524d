"""Prefix tuning: keys and values before those of the text, in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...anatomy import (
    Positions,
    PositionUnit,
    attention_of,
    decoder_of,
    position_modules,
    self_attentions,
)
from ...base import Host
from ...config import AdapterConfig
from ...method import AdapterUnit, register
from ...prompt_learning import PROMPT_KEY, PromptMethod
from .config import PrefixTuningConfig
from .unit import PrefixUnit, widths

__all__ = ["PrefixTuning", "PrefixTuningConfig", "PrefixUnit"]


@register
class PrefixTuning(PromptMethod):
    """Prefix tuning of decoders, of the decoders behind encoders, and of encoders."""

    peft_type: ClassVar[str] = PrefixTuningConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = PrefixTuningConfig
    units: ClassVar[dict[str, type[AdapterUnit]]] = {"attention": PrefixUnit, "positions": PositionUnit}

    @classmethod
    def host(cls, layer: nn.Module) -> type[Host] | None:
        """See `LayerMethod.host`."""
        return attention_of(layer) or (Positions if Positions.accepts(layer) else None)

    @staticmethod
    def places(config: Any, model: nn.Module) -> tuple[Any, list[str], dict[str, str]]:
        """See `LayerMethod.places`: self-attentions, and what makes positions for them."""
        found, moved = _hosts(model)
        kinds = [(path, attention_of(layer), layer) for path, layer in found]
        for path, kind, layer in kinds:
            assert kind is not None
            try:
                kind.check(layer)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        config = config.with_saved(model)
        _check_length(config.num_virtual_tokens, moved)
        if config.num_layers not in (None, len(found)):
            raise ValueError(
                f"num_layers={config.num_layers}: this {type(model).__name__} has {len(found)} self-attentions, and a "
                "prefix for each; leave the option out"
            )
        heads, size = kinds[0][1].heads(kinds[0][2])  # type: ignore[union-attr]
        width = config.token_dim or heads * size
        both = decoder_of(model) is not None
        if config.num_transformer_submodules == 2 and not both:
            raise ValueError(f"num_transformer_submodules=2: this {type(model).__name__} is no encoder with a decoder")
        config = config.replaced(
            num_layers=len(found),
            token_dim=width,
            num_attention_heads=config.num_attention_heads or heads,
            num_transformer_submodules=config.num_transformer_submodules or (2 if both else 1),
            encoder_hidden_size=config.encoder_hidden_size or width,
        )
        first: dict[int, str] = {}
        sources = {}
        for block, (path, _) in zip(config.blocks, found, strict=True):
            if first.setdefault(block, path) != path:
                sources[path] = first[block]
        return config, [*(path for path, _ in found), *(path for path, _ in moved)], sources

    @classmethod
    def finish(cls, unit: AdapterUnit, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PromptMethod.finish`."""
        return {PROMPT_KEY: PrefixUnit.made(tensors)}

    @classmethod
    def joined(cls, config: Any, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `PromptMethod.joined`: the blocks side by side, (n, sum of widths); those that nothing reads are zero."""
        own = dict(zip(dict.fromkeys(config.blocks), (part[PROMPT_KEY] for part in parts), strict=True))
        zeros = torch.zeros_like(parts[0][PROMPT_KEY])
        return {PROMPT_KEY: torch.cat([own.get(block, zeros) for block in range(config.num_layers)], dim=1)}

    @classmethod
    def parted(cls, model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """See `PromptMethod.parted`."""
        if PROMPT_KEY not in tensors:
            return {}
        config, paths, sources = cls.places(config, model)
        sizes, prompt = widths(model, paths[: config.num_layers]), tensors[PROMPT_KEY]
        if prompt.dim() != 2 or prompt.shape[1] != sum(sizes):
            raise ValueError(
                f"{PROMPT_KEY} has shape {tuple(prompt.shape)}; the {len(sizes)} self-attentions of this "
                f"{type(model).__name__} take {sum(sizes)} features a virtual token"
            )
        blocks = prompt.split(sizes, dim=1)
        return {
            (path, PROMPT_KEY): blocks[block].contiguous()
            for path, block in zip(paths, config.blocks, strict=False)
            if path not in sources
        }


def _hosts(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """(path, module) of the self-attentions that get a prefix, and of what makes positions for them.

    Raises:
        ValueError: the model has no self-attention that is known.
    """
    inside = decoder_of(model) or ""
    part = model.get_submodule(inside)
    found = [(f"{inside}.{path}".strip("."), module) for path, module in self_attentions(part)]
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no self-attention of transformers, so there is nothing that could see a "
            "prefix"
        )
    return found, position_modules(part, inside)


def _check_length(tokens: int, moved: list[tuple[str, nn.Module]]) -> None:
    """Refuse a prefix that leaves the text no positions."""
    for path, module in moved:
        count = Positions.count(module)
        if count is not None and tokens >= count:
            raise ValueError(
                f"num_virtual_tokens={tokens}: a prefix of this length leaves no positions for the text ({path} has "
                f"{count})"
            )
