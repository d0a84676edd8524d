"""FSDP1 (`FullyShardedDataParallel`): the parameters of a unit are one flat tensor, of which each rank has a part."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .sharding import Sharding

# Model, or a module in it -> the outermost unit around it, as far as it has been looked for.
_outermost: weakref.WeakKeyDictionary[nn.Module, weakref.ref[FullyShardedDataParallel]] = weakref.WeakKeyDictionary()

# Units whose parameters are whole at the moment, in a block of `Fsdp1.whole`.
_whole: weakref.WeakSet[FullyShardedDataParallel] = weakref.WeakSet()


class Fsdp1(Sharding):
    """Parameters that `FullyShardedDataParallel` has flattened."""

    name = "FSDP1"

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """See `Sharding.holds`; where all is one unit, just the parameters themselves say so."""
        return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
            getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters()
        )

    @contextlib.contextmanager
    def whole(self, modules: Sequence[nn.Module], write: bool = False) -> Iterator[None]:
        """See `Sharding.whole`; all of a unit is gathered, for its parameters cannot be had one by one."""
        units = [unit for unit in self._units_of(modules) if unit not in _whole]
        with contextlib.ExitStack() as stack:
            for unit in units:
                stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=write))
                _whole.add(unit)
                stack.callback(_whole.discard, unit)
            yield

    def gradients(self, modules: Sequence[nn.Module]) -> list[dict[str, Tensor | None]]:
        """See `Sharding.gradients`: gathered as parameters are, in whose place they lie for the time of it."""
        units = self._units_of(modules)
        parts = [part for part in self._parts_of(modules) if part.requires_grad]
        seen = torch.tensor(float(any(p.grad is not None for p in parts)), device=parts[0].device)
        torch.distributed.all_reduce(seen, group=units[0].process_group)
        if not seen:
            return [{} for _ in modules]
        values = [p.detach().clone() for p in parts]
        try:
            for part in parts:
                part.detach().copy_(part.grad if part.grad is not None else torch.zeros_like(part))
            with self.whole(modules):
                return [
                    {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
                    for module in modules
                ]
        finally:
            self.put_back(list(zip(parts, values, strict=True)))

    def keep(self, modules: Sequence[nn.Module]) -> list[tuple[Any, Tensor]]:
        """See `Sharding.keep`; with use_orig_params=False the part of all of a unit."""
        return [(part, part.detach().clone()) for part in self._parts_of(modules)]

    @torch.no_grad()
    def put_back(self, kept: Sequence[tuple[Any, Tensor]]) -> None:
        """See `Sharding.put_back`."""
        for part, values in kept:
            part.detach().copy_(values)

    def _parts_of(self, modules: Sequence[nn.Module]) -> list[nn.Parameter]:
        """What this rank holds of `modules`: their own parameters, or the flat ones of their units."""
        holders = [*(unit.module for unit in self._units_of(modules)), *modules]
        return list(dict.fromkeys(part for holder in holders for part in holder.parameters(recurse=False)))

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

        visit(outermost_unit(self.model), None)
        return list(found)


def outermost_unit(model: nn.Module) -> FullyShardedDataParallel:
    """The unit that holds `model` and is in no other.

    Nothing inside a unit refers to it, and it alone can gather what lies in no inner unit; the collector of garbage
    knows of it. It is made the root, as its first forward would do: a unit that was gathered before would be one.

    Raises:
        RuntimeError: there is none, or there is one around it that was made the root of another model.
    """
    known = _outermost.get(model)
    unit = None if known is None else known()
    if unit is None:
        units: list[Any] = [held for held in gc.get_objects() if issubclass(type(held), FullyShardedDataParallel)]
        around = {unit: set(unit.modules()) for unit in units}
        around = {unit: inside for unit, inside in around.items() if model in inside}
        unit = next((unit for unit, inside in around.items() if inside.issuperset(around)), None)
    if unit is None:
        raise RuntimeError(
            f"the FullyShardedDataParallel around this {type(model).__name__} is gone, and with it parts of its "
            "parameters: keep what FullyShardedDataParallel(model) or accelerator.prepare(model) has returned"
        )
    if not unit.check_is_root():
        raise RuntimeError(
            f"the outermost FullyShardedDataParallel around this {type(model).__name__} has been inside of another one "
            "that is gone: keep what accelerator.prepare(model) has returned"
        )
    _outermost[model] = weakref.ref(unit)
    return unit


SHARDING = Fsdp1
