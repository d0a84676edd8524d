"""Where weights are: in memory, on the meta device, or with accelerate, which brings them for a forward."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distributed.sharding import whole


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks on `module`."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def home_of(module: nn.Module, weight: Tensor) -> torch.device:
    """The device that `module` computes on: that of `weight`, or its hook's while accelerate keeps that elsewhere."""
    if not weight.is_meta:
        return weight.device
    devices = (getattr(hook, "execution_device", None) for hook in hooks_of(module))
    return next((torch.device(device) for device in devices if device is not None), weight.device)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps weights of `module`, or of one inside it, elsewhere."""
    hooked = (inner for inner in module.modules() if "_hf_hook" in inner.__dict__)
    return any(parameter.is_meta for inner in hooked for parameter in inner.parameters(recurse=False))


def preloaded_block(model: nn.Module) -> str | None:
    """Path of a module of which accelerate brings the weights of all that is inside it at once, or None."""
    for path, module in model.named_modules():
        if any(getattr(hook, "offload", False) and hook.place_submodules for hook in hooks_of(module)):
            return path
    return None


def placed(value: Tensor, home: torch.device, dtype: torch.dtype) -> Tensor:
    """`value` itself where it is as wanted; for a weight without values (`home` is meta) it stays where it is."""
    return value.to(value.device if home.type == "meta" else home, dtype)


def copy_with(module: nn.Module, values: Mapping[str, Tensor] | None, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of `module` which holds `values`, by their names in its state dict, without copying what it held.

    Args:
        module: what to copy; where accelerate brings its weights, the copy keeps its own.
        values: by default those of `module`.
        memo: as that of `copy.deepcopy`; parameters that are met again stay tied.

    Raises:
        RuntimeError: there are neither values here nor in `values`.
    """
    if is_offloaded(module) and values is None:
        raise RuntimeError(
            "it is offloaded to the CPU or the disk and cannot be trained whole; load the model with a device_map "
            "that keeps it in memory"
        )
    for path, inner in module.named_modules():
        # A copy of the hook would be a copy of all that it keeps.
        hook = inner.__dict__.get("_hf_hook")
        memo[id(hook)] = hook
        for name, held in (*inner._parameters.items(), *inner._buffers.items()):
            key = f"{path}.{name}" if path else name
            if held is not None and values is not None and key in values and id(held) not in memo:
                value = placed(values[key], home_of(inner, held), held.dtype)
                memo[id(held)] = nn.Parameter(value) if isinstance(held, nn.Parameter) else value
    with whole(module, list(module.modules())):
        clone = copy.deepcopy(module, memo)
    if is_offloaded(module):
        for inner in clone.modules():
            for name in ("_hf_hook", "_old_forward", "forward"):
                inner.__dict__.pop(name, None)
    return clone
