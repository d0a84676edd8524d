"""A new LoRA adapter out of several that a model has: its configuration, and its weights on each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...base.kind import is_conv1d
from ...targets import resolve
from .combining import Combination, combine_deltas, combine_factors, delta
from .config import LoraConfig
from .unit import LoraUnit


def combined_config(
    combination: Combination, configs: Sequence[LoraConfig], model: nn.Module, paths: Sequence[str]
) -> LoraConfig:
    """The configuration of the new adapter, for the layers at `paths` and a scaling of 1.

    Raises:
        ValueError: the adapters' ranks differ where equal ones are needed, or one of them is more than A and B.
    """
    for name, config in zip(combination.adapters, configs, strict=True):
        beyond = {
            "use_dora": config.use_dora,
            "bias": config.bias != "none",
            "trainable_token_indices": config.trainable_token_indices is not None,
            "target_parameters": bool(config.target_parameters),
        }
        if any(beyond.values()):
            option = next(option for option, is_used in beyond.items() if is_used)
            raise ValueError(f"adapter {name!r} cannot be combined by weight: there is no sum of what {option} adds")
    rank = combination.rank_of([max(config.r, *config.rank_pattern.values(), 0) for config in configs])
    first = configs[0].replaced(
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        lora_bias=any(config.lora_bias for config in configs),
        init_lora_weights=True,
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
        inference_mode=False,
    )
    targets = [config.target_modules for config in configs if isinstance(config.target_modules, list)]
    if len(targets) == len(configs):
        joined = first.replaced(target_modules=sorted({name for target in targets for name in target}))
        if resolve(joined, model)[1] == list(paths):
            return joined
    return first.replaced(target_modules=list(paths))


@torch.no_grad()
def combine(
    combination: Combination, units: Sequence[LoraUnit], weights: Sequence[float], new: LoraUnit, layer: Any
) -> None:
    """Give `new` the combined weights of `units`, the adapters that the layer has, each with its weight.

    Raises:
        ValueError: the kind of combination is not defined for these units.
    """
    A, B = new.parameters_of_factors()
    pairs = [_factors(unit, combination) for unit in units]
    scalings = [unit.scaling for unit in units]
    if combination.over_deltas or combination.combination_type == "cat":
        groups = getattr(layer, "groups", 1)
        if groups > 1:
            raise ValueError(
                f"combination_type={combination.combination_type!r} is not defined for a convolution of {groups} "
                "groups, whose delta is no product of A and B; combine with 'linear' or another kind over factors"
            )
    if combination.over_deltas:
        deltas = [delta(*pair, scaling) for pair, scaling in zip(pairs, scalings, strict=True)]
        transposed = is_conv1d(layer) or isinstance(layer, nn.Embedding)
        found = combine_deltas(deltas, weights, combination, A.shape[0], stored_transposed=transposed)
    else:
        found = combine_factors(pairs, scalings, weights, combination, A.shape[0])
    A.copy_(found[0].view_as(A))
    B.copy_(found[1].view_as(B))
    if new.lora_bias is not None:
        new.lora_bias.zero_()
        for unit, weight in zip(units, weights, strict=True):
            if unit.lora_bias is not None:
                new.lora_bias.add_(weight * unit.scaling * unit.lora_bias)


def _factors(unit: LoraUnit, combination: Combination) -> tuple[Tensor, Tensor]:
    """A and B of a unit; with those it started from beside them where that was not zero (PiSSA)."""
    if unit.start_A is not None and not (combination.over_deltas or combination.combination_type == "cat"):
        raise ValueError(
            f"combination_type={combination.combination_type!r} adds factors element by element, which means "
            "nothing for an adapter that started from the weight itself (PiSSA, OLoRA); use 'cat' or 'svd'"
        )
    return unit.with_start(*unit.parameters_of_factors())
