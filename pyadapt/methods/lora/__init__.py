"""LoRA: low-rank adaptation, one file for each form of layer and each way to start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...base import BaseWeight
from ...config import AdapterConfig
from ...discovery import import_submodules
from ...method import LayerMethod, Preparation, refuse_data, register
from ...planning import Plan
from ...targets import adapted_places
from . import eva, loftq
from .combining import Combination
from .config import LoraConfig
from .conversion import plain_lora
from .fused import fuse_experts
from .inits import check_start
from .unit import UNITS, LoraUnit
from .weighting import combine, combined_config

import_submodules(__name__, __path__)

__all__ = ["Lora", "LoraConfig", "LoraUnit"]


@register
class Lora(LayerMethod):
    """LoRA on every form of layer that has a unit here."""

    peft_type: ClassVar[str] = LoraConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = LoraConfig

    @classmethod
    def unit_class(cls, config: LoraConfig, base: type[BaseWeight]) -> type[LoraUnit]:
        """See `LayerMethod.unit_class`."""
        unit = UNITS.get((base.form, config.use_dora))
        if unit is None and (base.form, False) in UNITS:
            raise ValueError(f"use_dora: DoRA needs the norm of a weight's rows, which {base.form} weights have not")
        if unit is None:
            raise ValueError(f"LoRA cannot adapt {base.form} layers")
        return unit

    @classmethod
    def combination(
        cls, adapters: Sequence[str], weights: Sequence[float], svd_full_matrices: bool = True, **how: Any
    ) -> Combination:
        """See `LayerMethod.combination`; PEFT's `svd_full_matrices` changes no result and is passed over."""
        return Combination(adapters, weights, **how)

    combined_config = staticmethod(combined_config)
    combine = staticmethod(combine)

    @staticmethod
    def check(config: LoraConfig, model: nn.Module, paths: list[str]) -> None:
        """See `LayerMethod.check`; each layer must be able to start."""
        adapted = {path: adapted_places(config, path, model.get_submodule(path)) for path in paths}
        config.check_patterns(list(dict.fromkeys(place for path in paths for place in (path, *adapted[path]))))
        check_start(config, model, paths)

    @classmethod
    def read(
        cls, model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """See `LayerMethod.read`: adapters on single experts become one on all."""
        return fuse_experts(model, config, tensors, prefix)

    @classmethod
    def as_plain_lora(
        cls, model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """See `LayerMethod.as_plain_lora`."""
        return plain_lora(model, name, config, tensors, prefix)

    @staticmethod
    def prepare(plan: Plan, model: nn.Module, data: Any) -> Preparation:
        """See `LayerMethod.prepare`."""
        if plan.config.init_lora_weights == "eva":
            return eva.prepare(plan, model, data)
        refuse_data(data)
        return loftq.prepare(plan, model) if plan.config.init_lora_weights == "loftq" else Preparation(plan)
