"""FSDP1 (`FullyShardedDataParallel`): the parameters of a unit are one flat tensor, of which each rank has a part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .sharding import Sharding


class Fsdp1(Sharding):
    """Parameters that `FullyShardedDataParallel` has flattened."""

    name = "FSDP1"

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """See `Sharding.holds`."""
        return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())

    @contextlib.contextmanager
    def whole(self, modules: Sequence[nn.Module], write: bool = False) -> Iterator[None]:
        """See `Sharding.whole`; all of a unit is gathered, for its parameters cannot be had one by one."""
        units = self._units_of(modules)
        with contextlib.ExitStack() as stack:
            for unit in units:
                stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=write))
            yield

    def _units_of(self, modules: Sequence[nn.Module]) -> list[FullyShardedDataParallel]:
        """The units that hold the parameters of `modules`, each once, in the model's order."""
        wanted = set(modules)
        found: dict[FullyShardedDataParallel, None] = {}

        def visit(module: nn.Module, unit: FullyShardedDataParallel | None) -> None:
            unit = module if isinstance(module, FullyShardedDataParallel) else unit
            if module in wanted and unit is not None:
                found[unit] = None
            for child in module.children():
                visit(child, unit)

        visit(self.model, None)
        return list(found)


SHARDING = Fsdp1
