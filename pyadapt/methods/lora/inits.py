"""How A and B of a LoRA adapter start: the registry of the ways, and those that look at no weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ...base import base_of

if TYPE_CHECKING:
    from ...base import BaseWeight
    from .config import LoraConfig
    from .unit import LoraUnit

# Gives A and B their first values.
Start = Callable[["LoraUnit", "LoraConfig", "type[BaseWeight]", Any], None]
# Raises ValueError or RuntimeError where the layer at a path of a model cannot start so.
Check = Callable[["LoraConfig", nn.Module, str, "type[BaseWeight]", Any], None]
# Checks the options that go with an init and fills in what they leave out.
Complete = Callable[["LoraConfig"], None]


class Init(NamedTuple):
    """One way to start.

    Attributes:
        start: what gives the values.
        check: asked of each linear layer before anything is changed. An init that has one is for linear layers alone;
            embeddings then start by their own rule, as in PEFT.
        complete: asked when a configuration is made.
        moves: whether B A is not zero at first, so that an adapter is more than its A and B.
    """

    start: Start
    check: Check | None = None
    complete: Complete | None = None
    moves: bool = False


def complete_options(config: LoraConfig) -> None:
    """Check `init_lora_weights` and the options that belong to it, and fill in their defaults.

    Raises:
        ValueError: a name that is not known, or a bad option.
    """
    name = config.init_lora_weights
    if isinstance(name, str):
        config.init_lora_weights = name.lower()
    if not isinstance(name, (bool, str)) or _key(config) not in INITS:
        raise ValueError(f"init_lora_weights={name!r} is not one of {', '.join(map(repr, INITS))}")
    complete = INITS[_key(config)].complete
    if complete is not None:
        complete(config)


def start_moves(config: LoraConfig) -> bool:
    """Whether an adapter of this configuration starts with more than its A and B (see `Init.moves`)."""
    return INITS[_key(config)].moves


def check_start(config: LoraConfig, model: nn.Module, paths: list[str]) -> None:
    """Refuse, before anything is changed, layers that cannot start as the configuration says."""
    check = INITS[_key(config)].check
    if check is None:
        return
    for path in paths:
        layer = model.get_submodule(path)
        base = base_of(layer)
        assert base is not None
        try:
            if base.form == "linear":
                check(config, model, path, base, layer)
            elif base.form != "embedding":
                raise ValueError(f"it is for linear layers, not {base.form}; name this one in exclude_modules")
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"init_lora_weights={config.init_lora_weights!r} on {path}: {error}") from None


def initialize(unit: LoraUnit, config: LoraConfig, base: type[BaseWeight], layer: Any) -> None:
    """Give A and B of `unit` the first values that `config.init_lora_weights` names."""
    with torch.no_grad():
        if unit.lora_bias is not None:
            unit.lora_bias.zero_()
        INITS[_key(config)].start(unit, config, base, layer)


def _key(config: LoraConfig) -> bool | str:
    """The name in `INITS` that a configuration means."""
    name = config.init_lora_weights
    return re.sub(r"_niter_\d+$", "_niter_<n>", name) if isinstance(name, str) else name


def start_kaiming(unit: LoraUnit, *context: Any) -> None:
    """A Kaiming-uniform and B zero: the adapter is the identity at first."""
    A, B = unit.parameters_of_factors()
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    nn.init.zeros_(B)


def _start_gaussian(unit: LoraUnit, *context: Any) -> None:
    """A normal with deviation 1/r and B zero."""
    A, B = unit.parameters_of_factors()
    nn.init.normal_(A, std=1 / A.shape[0])
    nn.init.zeros_(B)


def _start_both_random(unit: LoraUnit, *context: Any) -> None:
    """Both Kaiming-uniform, so that the adapter is not the identity at first (for tests)."""
    for factor in unit.parameters_of_factors():
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def _start_orthogonal(unit: LoraUnit, *context: Any) -> None:
    """A and B random, with B A = 0 since they use the odd and the even rows of one orthogonal matrix.

    Source: Datta, "Rethinking LoRA initialisation", 2024 (datta0.github.io/posts/rethink-lora-init).
    """
    A, B = unit.parameters_of_factors()
    r = A.shape[0]
    # Drawn on the CPU in fp32 and in PEFT's order, so that a seed means the same everywhere.
    Q = torch.linalg.qr(torch.randn(r, r)).Q
    A.copy_((torch.randn(A.shape[1], r // 2) @ Q[0::2]).t() / 10)
    B.copy_(torch.randn(r // 2, B.shape[0]).t() @ Q[1::2] / 10)


def _check_orthogonal(config: LoraConfig, model: nn.Module, path: str, *layer: Any) -> None:
    r = config.rank_of(path)
    if r % 2:
        raise ValueError(f"the rank must be even, as A takes one half of a matrix's rows and B the other; it is {r}")


INITS: dict[bool | str, Init] = {
    True: Init(start_kaiming),
    False: Init(_start_both_random),
    "gaussian": Init(_start_gaussian),
    "orthogonal": Init(_start_orthogonal, _check_orthogonal),
}
