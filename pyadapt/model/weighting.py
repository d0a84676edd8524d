"""Adding an adapter that is a weighted combination of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..layer import adapted_layers, saved_modules
from ..method import METHODS
from ..planning import make_plan

if TYPE_CHECKING:
    from .adapters import AdapterVerbs


def add_weighted(model: AdapterVerbs, name: str, adapters: Sequence[str], weights: Sequence[float], **how: Any) -> None:
    """Add the adapter `name`, made of `adapters` times `weights` in the way that their method defines.

    Raises:
        ValueError: the arguments do not fit each other or the adapters; the model is unchanged.
    """
    configs = [model.peft_config[adapter] for adapter in adapters]
    kinds = sorted({config.peft_type for config in configs})
    if len(kinds) > 1:
        raise ValueError(f"adapters of different methods ({', '.join(kinds)}) cannot be combined by weight")
    method = METHODS[kinds[0]]
    combination = method.combination(adapters, weights, **how)
    layers = {path: layer for path, layer in adapted_layers(model) if any(a in layer.adapters for a in adapters)}
    config = method.combined_config(combination, configs, model, list(layers))
    trained_whole = _one_copy_each(model, adapters)
    model.add_planned(make_plan(model, config, trained=False), name, trainable=True)
    try:
        for layer in layers.values():
            parts = [(unit, weight) for a, weight in zip(adapters, weights, strict=True) if (unit := layer.unit(a))]
            new = layer.unit(name)
            method.combine(combination, [unit for unit, _ in parts], [weight for _, weight in parts], new, layer)
        for module, adapter in trained_whole:
            if name in module.copies:
                with torch.no_grad():
                    module.copies[name].load_state_dict(module.copies[adapter].state_dict())
    except BaseException:
        model.delete_adapter(name)
        raise


def _one_copy_each(model: AdapterVerbs, adapters: Sequence[str]) -> list[tuple[Any, str]]:
    """(module that is trained whole, the one adapter that trains it)."""
    found = []
    for path, module in saved_modules(model):
        having = [adapter for adapter in adapters if adapter in module.copies]
        if len(having) > 1:
            raise ValueError(f"{path} is trained whole by {', '.join(having)}: there is no weighted sum of them")
        found += [(module, adapter) for adapter in having]
    return found
