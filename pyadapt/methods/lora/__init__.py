"""LoRA: low-rank adaptation, one file for each form of layer and each way to start."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ...base import BaseWeight
from ...config import AdapterConfig
from ...discovery import import_submodules
from ...method import LayerMethod, register
from .config import LoraConfig, matches
from .unit import UNITS, LoraUnit

import_submodules(__name__, __path__)

__all__ = ["Lora", "LoraConfig", "LoraUnit"]


@register
class Lora(LayerMethod):
    """LoRA on every form of layer that has a unit here."""

    peft_type: ClassVar[str] = LoraConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = LoraConfig

    @staticmethod
    def unit_class(config: LoraConfig, base: type[BaseWeight]) -> type[LoraUnit]:
        """See `LayerMethod.unit_class`."""
        unit = UNITS.get((base.form, config.use_dora))
        if unit is None and (base.form, False) in UNITS:
            raise ValueError(f"use_dora: DoRA needs the norm of a weight's rows, which {base.form} weights have not")
        if unit is None:
            raise ValueError(f"LoRA cannot adapt {base.form} layers")
        return unit

    @staticmethod
    def rank(config: LoraConfig, path: str) -> int:
        """See `LayerMethod.rank`."""
        return config.rank_of(path)

    @staticmethod
    def check(config: LoraConfig, model: nn.Module, paths: list[str]) -> None:
        """A pattern that matches no target is a mistake in its spelling."""
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, option):
                if not any(matches(pattern, path) for path in paths):
                    raise ValueError(f"{option} {pattern!r} matches none of the {len(paths)} adapted layers")
