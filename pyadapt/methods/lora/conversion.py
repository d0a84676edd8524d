"""A LoRA adapter that started from its layer's weight (PiSSA, OLoRA) as a plain one.

What the adapter adds to W is s (B A - B0 A0) = s [B, -B0] [A; A0]: a plain LoRA of twice the rank, on the weights from
before. alpha is doubled too, or multiplied by sqrt(2) under rsLoRA, so that s stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...layer import adapted_layers
from .config import LoraConfig


def plain_lora(
    model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor], prefix: str
) -> tuple[Any, dict[str, Tensor]]:
    """The adapter called `name` as a plain LoRA on the original weights.

    Args:
        model: a wrapped model.
        name: the adapter.
        config: its configuration.
        tensors: its values under their keys in a file, which may have been gathered from elsewhere.
        prefix: what stands before a layer's path in the keys.

    Returns:
        The configuration and the values of the plain adapter. One that did not start from its layer's weight is
        plain already and comes back as it was.

    Raises:
        ValueError: the adapter belongs to weights that LoftQ has changed.
    """
    if config.init_lora_weights == "loftq":
        raise ValueError(
            f"adapter {name!r} fits the weights that LoftQ has quantised, not the original ones, and cannot be plain"
        )
    units: dict[str, Any] = {path: unit for path, layer in adapted_layers(model) if (unit := layer.unit(name))}
    if all(getattr(unit, "start_A", None) is None for unit in units.values()):
        return config, dict(tensors)
    plain = dict(tensors)
    for path, unit in units.items():
        A, B = unit.parameters_of_factors()
        for attribute, parameter in unit.named_parameters(recurse=False):
            key = f"{prefix}{path}.{unit.file_keys[attribute]}"
            if parameter is A:
                plain[key] = torch.cat([plain[key], _start(unit.start_A, plain[key])])
            elif parameter is B:
                plain[key] = torch.cat([plain[key], -_start(unit.start_B, plain[key])], dim=1)
    factor = math.sqrt(2) if config.use_rslora else 2
    return (
        config.replaced(
            r=2 * config.r,
            rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
            lora_alpha=factor * config.lora_alpha,
            alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
            init_lora_weights=True,
        ),
        plain,
    )


def _start(start: Tensor | None, like: Tensor) -> Tensor:
    """A start factor beside the trained one; zero for a layer, such as an embedding, that has none."""
    return torch.zeros_like(like) if start is None else start.to(like)
