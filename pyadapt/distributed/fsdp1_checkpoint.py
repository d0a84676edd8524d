"""What FSDP1's units give a checkpoint: all that training changes, and nothing of frozen units, which are not gathered.

accelerate and Trainer save the state dict of the outermost unit. On its way through the modules it comes to the wrapped
model, which answers here. What the outermost unit holds itself (embeddings, the last norm, the head) it has gathered by
then, and wants to find in the answer: what of it is frozen is taken out at the very end.
"""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.fsdp import FullyShardedDataParallel

from ..layer import WRAPPED
from ..trained import MARK, Trained, frozen_names, mark_of
from .fsdp1 import outermost_unit

# The models whose outermost unit leaves out what is frozen.
_left_out: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# The optimizers that show a state before they have one.
_awaiting: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def fill_state_dict(model: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Put the state of `model` into `destination`, in the midst of the outermost unit's `state_dict`.

    Args:
        model: a wrapped model.
        destination: what `torch.nn.Module.state_dict` hands on.
        prefix: of the model's names in it.
        keep_vars: as there.
    """
    trained = Trained(model)

    def visit(module: nn.Module, path: str, of_outermost: bool) -> None:
        start = prefix + path
        if isinstance(module, FullyShardedDataParallel):
            if _trains(module):
                module.state_dict(destination=destination, prefix=start, keep_vars=keep_vars)
            else:
                visit(module.module, path, False)
            return
        if of_outermost:
            module._save_to_state_dict(destination, start, keep_vars)
        else:
            buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if path + name in trained}
            destination.update((start + name, buffer.detach()) for name, buffer in buffers.items())
        for name, child in module._modules.items():
            if child is not None:
                visit(child, path if name in WRAPPED else f"{path}{name}.", of_outermost)

    visit(model, "", True)
    destination[prefix + MARK] = mark_of(model)
    if model not in _left_out:
        _left_out.add(model)
        hook = functools.partial(_leave_out_frozen, model, prefix)
        outermost_unit(model)._register_state_dict_hook(hook)
        logging.getLogger("torch.distributed.fsdp._state_dict_utils").addFilter(_is_news)


def await_optimizer_state(model: nn.Module) -> None:
    """Let each optimizer over `model` show, as long as it has taken no step, the state that it will have.

    accelerate reads an optimizer's part of a SHARDED_STATE_DICT into the state that the optimizer shows: into nothing,
    where it has none yet, and then trains on without any. It asks for that behind the state of the model.

    Args:
        model: a wrapped model that is being loaded.
    """
    parameters = set(outermost_unit(model).parameters())
    every: list[Any] = [held for held in gc.get_objects() if issubclass(type(held), torch.optim.Optimizer)]
    # Not accelerate's own, which is around one of these and has no hooks.
    for optimizer in (held for held in every if "_optimizer_state_dict_pre_hooks" in vars(held)):
        optimized = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if optimizer not in _awaiting and not optimizer.state and any(each in parameters for each in optimized):
            _show_state_to_come(optimizer)


def _show_state_to_come(optimizer: torch.optim.Optimizer) -> None:
    _awaiting.add(optimizer)
    made = False

    def before(optimizer: torch.optim.Optimizer) -> None:
        nonlocal made
        made = not optimizer.state
        _init_optim_state(optimizer)

    def after(optimizer: torch.optim.Optimizer, state_dict: Any) -> None:
        if made:
            optimizer.state.clear()

    optimizer.register_state_dict_pre_hook(before)
    optimizer.register_state_dict_post_hook(after)


def _trains(unit: FullyShardedDataParallel) -> bool:
    """Whether anything is trained of what the unit holds itself."""

    def own(module: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in module.parameters(recurse=False)) or any(
            own(child) for child in module.children() if not isinstance(child, FullyShardedDataParallel)
        )

    return own(unit.module)


def _is_news(record: logging.LogRecord) -> bool:
    """Filter of torch's warnings, one for each frozen parameter that a checkpoint lacks, as it should.

    What is trained and missing is an error of the model's own (`trained.check_mark`).
    """
    return not str(record.msg).startswith("Did not find param with FQN")


def _leave_out_frozen(model: nn.Module, prefix: str, root: nn.Module, state_dict: dict[str, Any], *rest: Any) -> None:
    """Hook of the outermost unit, behind its own: `prefix` is before the names of `model`."""
    for name in frozen_names(model, state_dict, prefix):
        del state_dict[name]
