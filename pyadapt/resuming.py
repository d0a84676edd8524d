"""What training keeps of an adapter beside its weights, in a file of its own: so that a resumed training is the same.

    adapter_training_state.safetensors     `<path of the layer>.<attribute of the unit>`

The file is there only where a method needs it (AdaLoRA, while its schedule runs), and is read for adapters that are to
be trained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .files import AdapterFileError, read_tensors, write_safetensors
from .layer import adapted_layers

TRAINING_STATE_FILE = "adapter_training_state.safetensors"


def training_state(model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What the units of the adapter called `name` need to go on, under its keys in the file.

    Args:
        model: a wrapped model.
        name: the adapter.
        state_dict: the whole model's state dict where an engine has gathered it; what it lacks is taken from the model.
    """
    gathered = state_dict or {}
    return {
        f"{path}.{attribute}": gathered.get(f"{path}.adapters.{name}.{attribute}", tensor)
        for path, attribute, tensor in _places(model, name)
    }


def write_training_state(folder: str, tensors: Mapping[str, Tensor]) -> None:
    """Write what `training_state` gave into an adapter's folder; where that is nothing, an older file goes."""
    path = os.path.join(folder, TRAINING_STATE_FILE)
    if tensors:
        write_safetensors(path, tensors)
    elif os.path.exists(path):
        os.remove(path)


def read_training_state(folder: str) -> dict[str, Tensor]:
    """What `write_training_state` has left in an adapter's folder; empty where that is nothing.

    Raises:
        AdapterFileError: the file is damaged.
    """
    path = os.path.join(folder, TRAINING_STATE_FILE)
    return read_tensors(path) if os.path.exists(path) else {}


def fill_training_state(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `read_training_state` gave, if anything, into the adapter called `name`.

    Raises:
        AdapterFileError: it belongs to another adapter; nothing was copied.
    """
    if not tensors:
        return
    places = training_state(model, name)
    wanted = {key: tuple(tensor.shape) for key, tensor in places.items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if wanted != found:
        wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise AdapterFileError(
            f"{TRAINING_STATE_FILE} does not belong to this adapter: {', '.join(wrong[:4])} differ; remove it to start "
            "the schedule of the training anew"
        )
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(tensors[key])


def _places(model: nn.Module, name: str) -> list[tuple[str, str, Tensor]]:
    """(path of the layer, attribute, live tensor)."""
    units = ((path, layer.unit(name)) for path, layer in adapted_layers(model))
    return [
        (path, key, value) for path, unit in units if unit is not None for key, value in unit.training_state().items()
    ]
