"""The installed `peft` as a twin of a wrapped model, and what must not change when something fails."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn


def peft_twin(model: nn.Module, adapter_name: str = "default", **config: Any) -> Any:
    """A deep copy of the plain `model` with a LoRA adapter of peft on it."""
    import peft

    with warnings.catch_warnings():
        # peft says so of each Conv1D, and then does it.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config), adapter_name)


def copy_adapter_to_peft(model: Any, twin: Any, name: str = "default") -> None:
    """Give peft's twin the values of our adapter; every one of its tensors must be met."""
    import peft

    ours = {f"base_model.model.{key}": value for key, value in model.get_adapter_state_dict(name).items()}
    theirs = peft.get_peft_model_state_dict(twin, adapter_name=name)
    assert sorted(ours) == sorted(theirs)
    peft.set_peft_model_state_dict(
        twin, {key: value.detach().clone() for key, value in ours.items()}, adapter_name=name
    )


def peft_key(own_name: str) -> str:
    """peft's parameter name for one of ours: `...adapters.<name>.lora_A` -> `...lora_A.<name>.weight`."""
    path, marker, rest = own_name.partition(".adapters.")
    if marker:
        name, _, matrix = rest.partition(".")
        return f"base_model.model.{path}.{matrix}.{name}.weight"
    path, marker, rest = own_name.partition(".copies.")
    assert marker, own_name
    return f"base_model.model.{path}.modules_to_save.{rest}"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refused operation must leave alone: values, classes, flags, attributes."""
    return {
        "values": {key: (value.dtype, _bits(value)) for key, value in model.state_dict().items()},
        "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
        "classes": {path: type(module) for path, module in model.named_modules()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {path: module.training for path, module in model.named_modules()},
        "hooks": {path: len(module._forward_hooks) for path, module in model.named_modules()},
    }


def _bits(value: Tensor) -> bytes:
    # Compared as bytes, so that a NaN equals itself.
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
