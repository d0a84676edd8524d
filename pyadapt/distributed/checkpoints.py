"""What engines ask of a model that is to be saved or loaded in a checkpoint, and what they get: no base weights."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from . import launched


class WithoutBase(OrderedDict[str, Any]):
    """A state dict from which names that it lacks may be taken out again.

    torch's `get_model_state_dict(..., ignore_frozen_params=True)` takes out what is frozen, which is not in it.
    """

    def pop(self, key: str, default: Any = None) -> Any:
        """As `dict.pop`, and None for a name that is not there."""
        return super().pop(key, default)

    def __reduce__(self) -> tuple[Any, ...]:
        """A file has a plain OrderedDict, which every reader knows."""
        return OrderedDict, (), vars(self), None, iter(self.items())


def saves_without_base(model: nn.Module) -> bool:
    """Whether the state dict of `model` is that of a checkpoint: it is sharded by FSDP2, and its values are there.

    While accelerate distributes a model (`cpu_ram_efficient_loading`) they are not there, and all names are wanted.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        return False
    return not any(parameter.is_meta for parameter in model.parameters())


def is_under_accelerates_fsdp1(model: nn.Module) -> bool:
    """Whether checkpoints of `model` are made by accelerate, from FSDP1: see `fsdp1_checkpoint`.

    A loop without accelerate has the base in them: torch's own `set_state_dict` wants all names that FSDP1 wraps.
    """
    if launched.engine_to_come() != "fsdp1":
        return False
    from .fsdp1 import Fsdp1

    return Fsdp1.holds(model)


def meet_engine(hook: Callable[..., Any]) -> None:
    """Let DeepSpeed's engine write and read checkpoints of the adapters, when it puts its hook on a wrapped model.

    Engines do not introduce themselves in any other way to the model they are given. One that is not known by its hook
    keeps its own checkpoints.
    """
    deepspeed: Any = sys.modules.get("deepspeed")
    if deepspeed is None or not getattr(hook, "__qualname__", "").startswith("DeepSpeedEngine."):
        return
    from .zero3_checkpoint import adopt_engine

    for cell in getattr(hook, "__closure__", None) or ():
        if isinstance(cell.cell_contents, deepspeed.DeepSpeedEngine):
            adopt_engine(cell.cell_contents)
