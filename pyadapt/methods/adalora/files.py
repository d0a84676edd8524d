"""An AdaLoRA adapter in files: without the ranks that training has taken away, and as a plain LoRA."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...layer import adapted_layers
from ..lora.config import LoraConfig
from .config import AdaLoraConfig
from .unit import AdaLoraUnit


def pruned(
    model: nn.Module, name: str, config: AdaLoraConfig, tensors: dict[str, Tensor], prefix: str
) -> tuple[AdaLoraConfig, dict[str, Tensor]]:
    """The adapter called `name` as PEFT saves it: the ranks that the last allocation has kept, and which they were.

    Before that one nothing is left out, so that training can go on from the file (PEFT leaves out what the latest one
    has masked, which might have come back).

    Args:
        model: a wrapped model.
        name: the adapter.
        config: its configuration.
        tensors: its values under their keys in a file.
        prefix: what stands before a layer's path in the keys.
    """
    settled = {path: unit for path, unit in _units(model, name).items() if unit.is_scheduled and bool(unit.settled)}
    if not settled:
        return config, tensors
    left = dict(tensors)
    for path, unit in settled.items():
        for factor in unit.FACTORS:
            key = f"{prefix}{path}.lora_{factor}"
            kept = unit.kept.to(left[key].device)
            left[key] = left[key][:, kept] if factor == "B" else left[key][kept]
    return config.with_pattern({path: unit.kept.tolist() for path, unit in settled.items()}), left


def plain_lora(
    model: nn.Module, name: str, config: AdaLoraConfig, tensors: Mapping[str, Tensor], prefix: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter called `name` as a LoRA: s B (E * A) is one of the same rank, with E in A.

    Args:
        model: a wrapped model.
        name: the adapter.
        config: its configuration.
        tensors: its values under their keys in a file, all ranks or just those that are left.
        prefix: what stands before a layer's path in the keys.

    Returns:
        The configuration and the values of the LoRA. A layer without any rank gets one of zeros, as LoRA has no rank 0.
    """
    units = _units(model, name)
    plain = {key: value for key, value in tensors.items() if not key.endswith((".lora_A", ".lora_B", ".lora_E"))}
    ranks, s = {}, config.scaling_of("")
    for path in units:
        A, B, E = (tensors[f"{prefix}{path}.lora_{factor}"] for factor in "ABE")
        A = A * E.to(A.device)
        if A.shape[0] == 0:
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        layer: Any = model.get_submodule(path)
        if layer.base.form == "conv":
            A = A.unflatten(1, (layer.in_channels, *layer.kernel_size))
            B = B.reshape(*B.shape, *(1 for _ in layer.kernel_size))
        plain[f"{prefix}{path}.lora_A.weight"], plain[f"{prefix}{path}.lora_B.weight"] = A, B
        ranks[path] = A.shape[0]
    r = max(ranks.values())
    other = {re.escape(path): rank for path, rank in ranks.items() if rank != r}
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(LoraConfig)}
    alphas = {pattern: s * rank for pattern, rank in other.items()}
    return LoraConfig(**{**own, "r": r, "lora_alpha": s * r, "rank_pattern": other, "alpha_pattern": alphas}), plain


def _units(model: nn.Module, name: str) -> dict[str, AdaLoraUnit]:
    found = {path: layer.unit(name) for path, layer in adapted_layers(model)}
    return {path: unit for path, unit in found.items() if isinstance(unit, AdaLoraUnit) and unit.source is None}
