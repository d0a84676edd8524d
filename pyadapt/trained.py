"""What of a wrapped model's state dict training changes: all but the frozen weights, which a checkpoint can do without.

That is every adapter with its buffers, trained copies of modules and biases, buffers of the base (running statistics),
parameters of the base that somebody has thawed by hand, and embeddings that an adapter's file carries.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .biases import COPY, biased_modules
from .distributed.sharding import whole_shape
from .files import AdapterFileError, write_safetensors
from .layer import WRAPPED, LiveDict, adapted_layers, base_modules, saved_modules
from .vocabulary import stored_weights

# The name of transformers and accelerate for the weights of a checkpoint, and a key that no model has: a file with it
# is a checkpoint's, without the base model, and who takes it for a whole model is told of an unexpected key. Its value
# says which adapters (`fingerprint`).
CHECKPOINT_FILE = "model.safetensors"
MARK = "pyadapt_checkpoint_without_base"


class Trained:
    """The names in the state dict of a wrapped model, without any prefix, of what training changes.

    Args:
        model: a wrapped model, in the hands of an engine or not.
    """

    def __init__(self, model: Any) -> None:
        self._within: set[str] = set()
        self._names: set[str] = set()
        for path, module in base_modules(model):
            start = f"{path}." if path else ""
            inside = [name for name, child in module._modules.items() if isinstance(child, LiveDict)]
            self._within.update(start + name for name in inside)
            self._names.update(
                start + name for name in module._buffers if name not in module._non_persistent_buffers_set
            )
            # Plain tensors with gradients are FSDP1's views of a flat parameter.
            self._names.update(
                start + name
                for name, parameter in module._parameters.items()
                if name.startswith(COPY) or (isinstance(parameter, nn.Parameter) and parameter.requires_grad)
            )
        for name in model.peft_config:
            self._names.update(own_name for own_name, _, _ in stored_weights(model, name).values())

    def __contains__(self, name: str) -> bool:
        """Whether training changes what the state dict has under `name`."""
        name = without_wrappers(name)
        if name in self._names:
            return True
        return any(name[:end] in self._within for end in _dots(name))


def frozen_names(model: Any, names: Iterable[str], prefix: str = "") -> list[str]:
    """Those of `names`, in a state dict, that are the model's and that training does not change.

    Args:
        model: a wrapped model, in the hands of an engine or not.
        names: with wrappers in them or without.
        prefix: what is before the model's names.
    """
    trained, start = Trained(model), without_wrappers(prefix)
    own = {name: without_wrappers(name) for name in names}
    return [
        name
        for name, bare in own.items()
        if bare.startswith(start) and bare.removeprefix(start) not in trained and bare != start + MARK
    ]


def fingerprint(model: Any) -> str:
    """A digest of which layers carry which adapters in which shapes, and of what else is trained beside the base.

    The same whether an engine has sharded the model or not.
    """
    lines = [
        f"{path} {name} {unit.shapes(config, path, layer.base, layer)}"
        for path, layer in adapted_layers(model)
        for name, config in model.peft_config.items()
        if (unit := layer.unit(name)) is not None
    ]
    lines += [f"{path} {sorted(module.copies)}" for path, module in saved_modules(model)]
    lines += [path for path, _ in biased_modules(model)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def mark_of(model: Any) -> Tensor:
    """The value of MARK in the checkpoints of a model: one int64."""
    return torch.tensor(int(fingerprint(model)[:15], 16))


def trained_state(model: Any) -> dict[str, Tensor]:
    """What training changes, out of the state dict of a model that is not sharded."""
    trained = Trained(model)
    return {name: value for name, value in nn.Module.state_dict(model).items() if name in trained}


def without_wrappers(name: str) -> str:
    """A name in a state dict as it is without the wrappers of FSDP1, torch.compile and activation checkpointing."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def write_trained_state(model: Any, folder: str, file: str = CHECKPOINT_FILE) -> None:
    """Write `trained_state` as the weights of a checkpoint, in a way that nobody takes for a whole model's."""
    tensors = {**trained_state(model), MARK: mark_of(model)}
    write_safetensors(os.path.join(folder, file), tensors)


def remove_trained_state(folder: str) -> None:
    """Take away what `write_trained_state` has left in `folder`; a whole model's file stays."""
    path = os.path.join(folder, CHECKPOINT_FILE)
    if is_trained_state(path):
        os.remove(path)


def is_trained_state(path: str) -> bool:
    """Whether the file is one of `write_trained_state`."""
    if not os.path.isfile(path):
        return False
    try:
        with safe_open(path, "pt") as file:
            return MARK in set(file.keys())
    except (OSError, SafetensorError):
        return False


def check_mark(model: Any, mark: Tensor) -> None:
    """Refuse the checkpoint of another model or other adapters, of which MARK is all that can be seen whole.

    Raises:
        AdapterFileError: so it is.
    """
    if int(mark) != int(mark_of(model)):
        raise AdapterFileError(
            f"the checkpoint belongs to another model or other adapters than this {type(model).__name__}; wrap the "
            "same model with the same configuration"
        )


def check_trained_state(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse the tensors of a checkpoint that was written over another model or other adapters.

    Args:
        model: a wrapped model.
        tensors: by their names in its state dict, without a prefix.

    Raises:
        AdapterFileError: names or shapes differ; the message lists which.
    """
    trained = Trained(model)
    wanted = {
        without_wrappers(name): whole_shape(value)
        for name, value in nn.Module.state_dict(model, keep_vars=True).items()
        if name in trained
    }
    found = {without_wrappers(name): tuple(value.shape) for name, value in tensors.items()}
    problems = list(_differences(wanted, found))
    if problems:
        more = [f"  and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise AdapterFileError(
            f"the checkpoint belongs to another model or other adapters than this {type(model).__name__}; wrap the "
            "same model with the same configuration:\n" + "\n".join(problems[:20] + more)
        )


def _differences(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield f"  missing:   {name} {wanted[name]}"
        elif name not in wanted:
            yield f"  extra:     {name} {found[name]}"
        elif wanted[name] != found[name]:
            yield f"  misshapen: {name} is {found[name]}, wanted {wanted[name]}"


def _dots(name: str) -> Iterator[int]:
    return (i for i, letter in enumerate(name) if letter == ".")
