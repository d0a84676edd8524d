"""How A and B of a LoRA adapter start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ...base import BaseWeight
    from .config import LoraConfig
    from .unit import LoraUnit

Init = Callable[["LoraUnit", "LoraConfig", "type[BaseWeight]", Any], None]


def check_init(init: bool | str) -> None:
    """Refuse a value of `LoraConfig.init_lora_weights` that is not known."""
    if init not in INITS:
        raise ValueError(f"init_lora_weights={init!r} is not one of {', '.join(map(repr, INITS))}")


def initialize(unit: LoraUnit, config: LoraConfig, base: type[BaseWeight], layer: Any) -> None:
    """Give A and B of `unit` the first values that `config.init_lora_weights` names."""
    with torch.no_grad():
        if unit.lora_bias is not None:
            unit.lora_bias.zero_()
        INITS[config.init_lora_weights](unit, config, base, layer)


def _kaiming(unit: LoraUnit, *context: Any) -> None:
    """A Kaiming-uniform and B zero: the adapter is the identity at first."""
    A, B = unit.parameters_of_factors()
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B)


def _gaussian(unit: LoraUnit, *context: Any) -> None:
    """A normal with deviation 1/r and B zero."""
    A, B = unit.parameters_of_factors()
    nn.init.normal_(A, std=1 / A.shape[0])
    nn.init.zeros_(B)


def _both_random(unit: LoraUnit, *context: Any) -> None:
    """Both Kaiming-uniform, so that the adapter is not the identity at first (for tests)."""
    for factor in unit.parameters_of_factors():
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


INITS: dict[bool | str, Init] = {True: _kaiming, False: _both_random, "gaussian": _gaussian}
