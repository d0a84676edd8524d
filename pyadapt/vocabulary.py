"""The embedding weights that PEFT writes into an adapter's file beside the adapter.

    embeddings are targets (one is named in target_modules)   `<path>.base_layer.weight` of each that is adapted
    the vocabulary was resized after loading the base model   `<path>.weight` of both embeddings, or where a wrapper
                                                              of PEFT's would lie: `<path>.base_layer.weight`,
                                                              `<path>.token_adapter.base_layer.weight`

They are the base model's own weights, so reading them changes nothing unless the file was made over others.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import base_of
from .layer import AdaptedLayer, SavedModule, base_modules
from .tokens import TokenUnit
from .tying import input_embedding, output_embedding

logger = logging.getLogger("pyadapt")

# The names of targets by which PEFT knows that an embedding is among them; the embedding first.
_NAMES = ("embed_tokens", "lm_head")
# Where the weight of an embedding lies in a PEFT model.
_PLACES = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
# What PEFT writes twice with a resized vocabulary: tensors of the adapter under names that only it uses inside.
_AGAIN = re.compile(
    r"(token_adapter\.trainable_tokens_(delta|original)|lora_embedding_[AB])\.[^.]+|lora_[AB]\.[^.]+\.weight"
    r"|(modules_to_save|original_module)\..+"
)


def stored_weights(model: Any, name: str) -> dict[str, tuple[str, Any, Tensor]]:
    """Key below the model -> (name in its state dict, the embedding, its weight) of those to write with an adapter.

    Args:
        model: a wrapped model.
        name: the adapter.
    """
    config = model.peft_config[name]
    by_rows = getattr(config, "trainable_token_indices", None) is not None
    targeted = _is_targeted(config, model)
    if not (targeted and not by_rows) and not _is_resized(model, config):
        return {}
    found = {}
    for path, module in _embeddings(model):
        unit = module.unit(name) if isinstance(module, AdaptedLayer) else None
        if isinstance(module, SavedModule) or (targeted and unit is None):
            continue
        place = _PLACES[0] if unit is None else _PLACES[2] if isinstance(unit, TokenUnit) else _PLACES[1]
        found[f"{path}.{place}"] = (f"{path}.weight", module, _before_merging(module, model))
    return found


def weight_places(model: nn.Module) -> dict[str, Any]:
    """Every key under which a file may hold the weight of an embedding -> that embedding."""
    return {f"{path}.{place}": module for path, module in _embeddings(model) for place in _PLACES}


def without_repetitions(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`tensors` of a file without what PEFT has written twice."""
    paths = [f"{prefix}{path}." for path, _ in _embeddings(model)]
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not any(key.startswith(path) and _AGAIN.fullmatch(key[len(path) :]) for path in paths)
    }


def fill_weight(key: str, weight: nn.Parameter, value: Tensor) -> None:
    """Give an embedding the weight that a file holds, and tell it where that is another."""
    value = value.to(weight)
    if not torch.equal(weight, value):
        logger.warning("%s: the file holds another weight than the base model; the base model takes that over", key)
        with torch.no_grad():
            weight.copy_(value)


def _embeddings(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of the input embedding and the output head, where they hold a weight that is not quantised."""
    asked = (input_embedding(model), output_embedding(model))
    for path, module in base_modules(model):
        base = base_of(module)
        if any(module is one for one in asked) and base is not None and not base.quantized:
            yield path, module


def _is_targeted(config: Any, model: nn.Module) -> bool:
    wanted = getattr(config, "target_modules", None)
    if isinstance(wanted, str):
        paths = [path for path, _ in base_modules(model) if path.rpartition(".")[2] in _NAMES]
        return any(re.fullmatch(wanted, path) for path in paths)
    # Of a tied pair PEFT counts the embedding alone as a target.
    names = _NAMES[:1] if getattr(config, "ensure_weight_tying", False) else _NAMES
    return any(name in names for name in wanted or ())


def _is_resized(model: Any, config: Any) -> bool:
    """Whether the vocabulary has another size than that of the base model on disk, as far as that is at hand."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    source = getattr(config, "base_model_name_or_path", None)
    if not size or not source:
        return False
    path = os.path.join(source, "config.json")
    if not os.path.isfile(path):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json") if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) else None
        if not isinstance(cached, str):
            return False
        path = cached
    with open(path, encoding="utf-8") as file:
        before = type(model.config).from_dict(json.load(file))
    return getattr(before, "vocab_size", size) != size


def _before_merging(module: Any, model: nn.Module) -> Tensor:
    """The weight of `module` as it is without merged adapters."""
    for _, other in base_modules(model):
        kept = getattr(other, "unmerged", None) or {}
        if "weight" in kept and (other is module or getattr(other, "weight", None) is module.weight):
            return kept["weight"]
    return module.weight
