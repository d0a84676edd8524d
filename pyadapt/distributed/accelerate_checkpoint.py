"""Checkpoints of accelerate's `save_state` and `load_state` without the base model, by its own hooks."""

from __future__ import annotations

import os
from typing import Any

from ..files import AdapterFileError, read_tensors
from ..model import wrapped_inside
from ..trained import CHECKPOINT_FILE, is_trained_state, write_trained_state


def checkpoint_adapters(accelerator: Any) -> None:
    """Let `accelerator.save_state` save of wrapped models what training changes, and `load_state` read it back.

    Needed in one process and under DDP, where accelerate asks nobody what to save; without it the checkpoints hold the
    base model as well, and resume as exactly. Under FSDP and DeepSpeed nothing is left for it to do.

    Args:
        accelerator: an `accelerate.Accelerator`; call once, before or after `prepare`.
    """
    accelerator.register_save_state_pre_hook(_Save(accelerator))
    accelerator.register_load_state_pre_hook(_load)


class _Save:
    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def __call__(self, models: list[Any], weights: list[Any], folder: str) -> None:
        """Write the models whose state dicts are in `weights`, and take them out of it if they are all wrapped."""
        if not weights:
            return
        # accelerate numbers what is left in `weights` anew: so all or none.
        inside = [wrapped_inside(model) for model in models]
        if not all(model is not None for model in inside) or len(weights) != len(models):
            return
        state = self.accelerator
        each_node = state.project_configuration.save_on_each_node
        if state.is_local_main_process if each_node else state.is_main_process:
            for number, model in enumerate(inside):
                write_trained_state(model, folder, _file(number))
        weights.clear()


def _load(models: list[Any], folder: str) -> None:
    """Load models of which `_Save` has left files, and take them out of `models`."""
    paths = [os.path.join(folder, _file(number)) for number in range(len(models))]
    if not models or not is_trained_state(paths[0]):
        return
    for model, path in zip(models, paths, strict=True):
        inside = wrapped_inside(model)
        if inside is None:
            raise AdapterFileError(f"{path} holds adapters of pyadapt alone: wrap the model before it is loaded")
        inside.load_state_dict(read_tensors(path))
    models.clear()


def _file(number: int) -> str:
    """The name that accelerate gives the weights of its model of this number."""
    name, dot, ending = CHECKPOINT_FILE.partition(".")
    return CHECKPOINT_FILE if number == 0 else f"{name}_{number}{dot}{ending}"
