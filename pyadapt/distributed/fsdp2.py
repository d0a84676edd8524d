"""FSDP2 (`fully_shard`): a parameter is a DTensor, of which each rank has a part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .sharding import Sharding


class Fsdp2(Sharding):
    """Parameters that `fully_shard` has put on a mesh of ranks."""

    name = "FSDP2"

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """See `Sharding.holds`; between its forward and its backward the root's parameters are no DTensors."""
        return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
            isinstance(parameter, DTensor) for parameter in model.parameters()
        )

    @contextlib.contextmanager
    def whole(self, modules: Sequence[nn.Module], write: bool = False) -> Iterator[None]:
        """See `Sharding.whole`.

        The DTensors are taken out of their modules for the length of the block: so just what is asked for is gathered,
        and not the whole group of modules that FSDP2 gathers together.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        held: list[tuple[nn.Module, str, Any]] = []
        # Tied parameters stay tied.
        wholes: dict[Any, nn.Parameter] = {}
        for module in modules:
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    held.append((module, name, parameter))
                    if parameter not in wholes:
                        full = _gather(parameter)
                        wholes[parameter] = nn.Parameter(full, requires_grad=parameter.requires_grad)
        try:
            for module, name, parameter in held:
                module._parameters[name] = wholes[parameter]
            yield
        finally:
            for module, name, parameter in held:
                module._parameters[name] = parameter
            if write:
                for parameter, full in wholes.items():
                    _scatter(full.detach(), parameter)

    def class_of(self, module: nn.Module) -> type[nn.Module]:
        """See `Sharding.class_of`: `fully_shard` derives one from `FSDPModule` and the module's own."""
        made = type(module)
        return made.__bases__[1] if made.__bases__[0] is FSDPModule else made

    def gradients(self, modules: Sequence[nn.Module]) -> list[dict[str, Tensor | None]]:
        """See `Sharding.gradients`."""
        return [
            {name: None if parameter.grad is None else _gather(parameter.grad) for name, parameter in own.items()}
            for own in (dict(module.named_parameters(recurse=False)) for module in modules)
        ]

    def keep(self, modules: Sequence[nn.Module]) -> list[tuple[Any, Tensor]]:
        """See `Sharding.keep`."""
        parameters = {parameter: None for module in modules for parameter in module.parameters(recurse=False)}
        return [(parameter, _local(parameter).clone()) for parameter in parameters]

    @torch.no_grad()
    def put_back(self, kept: Sequence[tuple[Any, Tensor]]) -> None:
        """See `Sharding.put_back`."""
        for parameter, values in kept:
            _local(parameter).copy_(values)


def gather_between(owner: nn.Module, module: nn.Module) -> None:
    """Let what the groups between `owner` and `module`, a part of it, hold of it be at hand until their own forward."""
    path = next((path for path, inner in owner.named_modules() if inner is module), "").split(".")
    for end in range(len(path) - 1, 0, -1):
        around = owner.get_submodule(".".join(path[:end]))
        if isinstance(around, FSDPModule):
            around.unshard()
            return


def _local(parameter: Any) -> Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


@torch.no_grad()
def _gather(parameter: Any) -> Tensor:
    # With its CPU offload the shards lie on the CPU, where the mesh of a GPU does not communicate.
    return parameter.to(parameter.device_mesh.device_type).full_tensor()


@torch.no_grad()
def _scatter(full: Tensor, parameter: Any) -> None:
    parts = distribute_tensor(full, parameter.device_mesh, parameter.placements)
    parameter.to_local().copy_(parts.to_local())


SHARDING = Fsdp2
