"""What an engine that shards parameters is to the rest of pyadapt: it can show the parameters of modules whole.

A file beside this one for each engine (`zero3`, `fsdp1`, `fsdp2`); each registers itself. Nothing else in the package
knows what a shard looks like.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# Each engine's file, beside the module without which no model is sharded by it, which is not imported for the question.
_ENGINES = {"zero3": "deepspeed", "fsdp2": "torch.distributed.tensor", "fsdp1": "torch.distributed.fsdp"}


class Sharding(abc.ABC):
    """How one engine holds the parameters of one model.

    Every method whose name does not say otherwise is a collective: every rank has to come there.

    Args:
        model: the model, or any module in it.
    """

    name: ClassVar[str]
    # Whether a model may be made in shards, before any engine has it in hand.
    shards_plain_models: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    @abc.abstractmethod
    def holds(cls, model: nn.Module) -> bool:
        """Whether this engine keeps parameters of `model` in shards; asked by each rank for itself."""

    @abc.abstractmethod
    def whole(self, modules: Sequence[nn.Module], write: bool = False) -> contextlib.AbstractContextManager[None]:
        """Inside the block, the own parameters of `modules` have all their values, on every rank.

        Parameters must be read from their module inside the block, and not be kept.

        Args:
            modules: modules of the model; those inside them are not meant.
            write: whether what is written to the parameters is to be kept; every rank has to write the same.
        """

    def replacing(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Inside the block the own parameters of `module` are whole; those that it puts there are sharded after it.

        Raises:
            RuntimeError: the engine cannot take in others any more.
        """
        raise RuntimeError(
            f"a {type(module).__name__} cannot be given other parameters now that {self.name} has sharded it"
        )

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the model can be called, without gradients, also where no engine runs it yet."""
        return contextlib.nullcontext()

    def class_of(self, module: nn.Module) -> type[nn.Module]:
        """The class that `module` had before the engine gave it another, as some do."""
        return type(module)

    @abc.abstractmethod
    def gradients(self, modules: Sequence[nn.Module]) -> list[dict[str, Tensor | None]]:
        """The gradients of the own parameters of each of `modules`, whole, as the latest optimizer step has used them.

        That is before they are zeroed, and after they were clipped. By name of the parameter; None where no rank has
        one.

        Args:
            modules: modules of the model; those inside them are not meant.
        """

    @abc.abstractmethod
    def keep(self, modules: Sequence[nn.Module]) -> list[tuple[Any, Tensor]]:
        """Copies of what this rank holds of the own parameters of `modules`, for `put_back`; no collective.

        An engine that cannot take a module's part alone keeps that of the whole unit it is in.
        """

    @abc.abstractmethod
    def put_back(self, kept: Sequence[tuple[Any, Tensor]]) -> None:
        """Give the parameters, bit for bit, the values that `keep` has copied; no collective."""


def whole(
    model: nn.Module, modules: Sequence[nn.Module], write: bool = False
) -> contextlib.AbstractContextManager[None]:
    """`Sharding.whole` for a model that may be sharded or not; where it is not, nothing happens."""
    return whole_under(sharding_of(model), modules, write)


def whole_under(
    sharding: Sharding | None, modules: Sequence[nn.Module], write: bool = False
) -> contextlib.AbstractContextManager[None]:
    """`Sharding.whole` where the question how the model is sharded, if it is, has been asked already."""
    return contextlib.nullcontext() if sharding is None else sharding.whole(modules, write)


def replacing(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`Sharding.replacing` for a module that may be sharded or not; where it is not, nothing happens."""
    sharding = sharding_of(module)
    return contextlib.nullcontext() if sharding is None else sharding.replacing(module)


def running(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """`Sharding.running` for a model that may be sharded or not."""
    sharding = sharding_of(model)
    return contextlib.nullcontext() if sharding is None else sharding.running()


def call_inside(owner: nn.Module, module: nn.Module, *args: Any) -> Any:
    """Call `module` in the forward of `owner`, which is around it, while those of modules between them do not run.

    One of these may be the group that an engine gathers `module`'s parameters with.
    """
    # Each step of decoding comes here: no walk through the model where no process group, and so no shard, can be.
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if grouped and "torch.distributed.fsdp" in sys.modules and not torch.compiler.is_compiling():
        importlib.import_module(f"{__package__}.fsdp2").gather_between(owner, module)
    return module(*args)


def sharding_of(model: nn.Module) -> Sharding | None:
    """How the parameters of `model` are sharded, or None where each rank has them all."""
    for engine, needed in _ENGINES.items():
        if needed in sys.modules:
            kind: Any = importlib.import_module(f"{__package__}.{engine}").SHARDING
            if kind.holds(model):
                return kind(model)
    return None


def engine_of(model: nn.Module) -> str | None:
    """The engine that runs `model` already, as its errors call it; None where none does.

    Partitioned parameters alone are no engine: models may be made so (`deepspeed.zero.Init`).
    """
    wrapper = type(model).__name__
    if wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"):
        return wrapper
    # DeepSpeed's engine leaves a hook on its model.
    if any(
        getattr(hook, "__qualname__", "").startswith("DeepSpeedEngine.") for hook in model._forward_pre_hooks.values()
    ):
        return "DeepSpeedEngine"
    sharding = sharding_of(model)
    return None if sharding is None or sharding.shards_plain_models else sharding.name


def goes_by_attribute(parameter: Any) -> bool:
    """Whether an engine (FSDP1) looks for a parameter in state dicts under the name of its attribute alone."""
    return getattr(parameter, "_fsdp_flattened", False)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter with all its values; ZeRO-3 leaves an empty one in place and the shape beside it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
