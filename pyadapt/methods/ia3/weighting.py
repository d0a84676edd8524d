"""A new IA3 adapter out of several that a model has: l = the sum of w_i l_i, with l_i = 1 where one has no factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...targets import resolve
from .config import IA3Config
from .unit import IA3Unit


@dataclass(frozen=True)
class Combination:
    """Which adapters are combined, and how much of each.

    Raises:
        ValueError: there is not one number for each adapter, or one is not finite.
    """

    adapters: Sequence[str]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.adapters or len(self.adapters) != len(self.weights):
            raise ValueError(
                f"{len(self.adapters)} adapters and {len(self.weights)} weights: one weight each is needed"
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"weights={list(self.weights)}: finite numbers are needed")


def combined_config(
    combination: Combination, configs: Sequence[IA3Config], model: nn.Module, paths: Sequence[str]
) -> IA3Config:
    """The configuration of the new adapter, for the layers at `paths`.

    Raises:
        ValueError: a layer's input is scaled by one adapter and its output by another.
    """
    inputs = []
    for path in paths:
        layer: Any = model.get_submodule(path)
        sides = {name: unit.feedforward for name in combination.adapters if (unit := layer.unit(name)) is not None}
        if len(set(sides.values())) > 1:
            told = ", ".join(f"{name} its {'input' if side else 'output'}" for name, side in sides.items())
            raise ValueError(f"{path}: {told} is scaled by these adapters, which have no sum")
        inputs += [path] if any(sides.values()) else []
    exact = configs[0].replaced(
        target_modules=list(paths),
        feedforward_modules=inputs,
        exclude_modules=None,
        init_ia3_weights=True,
        inference_mode=False,
    )
    lists = [(config.target_modules, config.feedforward_modules) for config in configs]
    if any(isinstance(names, str) or names is None for pair in lists for names in pair):
        return exact
    joined = exact.replaced(
        target_modules=sorted({name for targets, _ in lists for name in targets or []}),
        feedforward_modules=sorted({name for _, feedforward in lists for name in feedforward or []}),
    )
    config, found = resolve(joined, model)
    same = found == list(paths) and [path for path in found if config.is_feedforward(path)] == inputs
    return joined if same else exact


@torch.no_grad()
def combine(combination: Combination, units: Sequence[IA3Unit], weights: Sequence[float], new: IA3Unit) -> None:
    """Give `new` the weighted sum of the factors of `units`, the adapters that the layer has, each with its weight.

    An adapter without factors on the layer multiplies by 1 there. (PEFT counts it as 0, so that half of each of two
    adapters halves what the layers give that one of them leaves alone.)
    """
    new.ia3_l.fill_(math.fsum(combination.weights) - math.fsum(weights))
    for unit, weight in zip(units, weights, strict=True):
        new.ia3_l.add_(unit.ia3_l.to(new.ia3_l.dtype), alpha=weight)
