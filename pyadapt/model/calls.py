"""Calling a wrapped model: an adapter for each row of the batch, and terms that adapters add to the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.sharding import sharding_of
from . import mixing
from .state import WithAdapters


class Calls(WithAdapters):
    """The call of the model; its `forward` stays its own, with its own signature."""

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call the model.

        Where the output has a `loss`, the active adapters in training add their terms to it, if their method has one
        (AdaLoRA's orthogonality).

        Args:
            args: as its own forward.
            adapter_names: the adapter for each row of the batch, `"__base__"` for none; by default the active ones
                serve all rows.
            kwargs: as its own forward, and what an active adapter's method asks for (multitask prompt tuning:
                `task_ids`).
        """
        if any(name in kwargs for name in self.adapter_state.arguments):
            with self.with_call_arguments(kwargs):
                return self(*args, adapter_names=adapter_names, **kwargs)
        if adapter_names is None:
            if not self.adapter_state.penalised:
                return super().__call__(*args, **kwargs)
            self._expect_penalties()
            return self._penalise(super().__call__(*args, **kwargs))
        with self.mixed(adapter_names, args, kwargs):
            return super().__call__(*args, **kwargs)

    @contextlib.contextmanager
    def with_call_arguments(self, kwargs: dict[str, Any], repeats: bool = False) -> Iterator[None]:
        """Inside the block, the active adapters have those of `kwargs` that are for them, which are taken out.

        Args:
            kwargs: the arguments of a call.
            repeats: whether the call may make several rows of each of the batch's.
        """
        wanted = self.adapter_state.arguments
        # Where the model is called within `generate`, that has been given them.
        given = {name: kwargs.pop(name) for name in wanted if name in kwargs}
        units = {unit for name in given for unit in wanted[name]}
        for unit in units:
            unit.call_arguments = {name: value for name, value in given.items() if unit in wanted[name]}
            unit.call_repeats = repeats
        try:
            yield
        finally:
            for unit in units:
                # Set, not deleted: torch.compile would delete what it never saw set.
                unit.call_arguments, unit.call_repeats = {}, False

    def mixed(
        self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Inside the block, row i of each batch is answered with the adapter `names[i]`, if args and names fit.

        Raises:
            RuntimeError: adapters are merged, or an engine has sharded the model.
            ValueError: a name is unknown or cannot be chosen by row, or there is not one for each row.
        """
        self.check_names([name for name in dict.fromkeys(names) if name != mixing.BASE_MODEL], allow_none=True)
        self.check_not_merged("choose adapters by row")
        sharding = sharding_of(self) if dist.is_available() and dist.is_initialized() else None
        if sharding is not None:
            raise RuntimeError(
                f"adapter_names: {sharding.name} has sharded this model, and all adapters of a layer would have to be "
                "whole at once: group the rows by adapter and call set_adapter() before each group's call, or serve "
                "without sharding"
            )
        mixing.check_batch(names, args, kwargs)
        return mixing.mixed(self, names)

    def adapter_penalty(self) -> Tensor | None:
        """The sum of the terms that the active adapters in training add to the loss; None where they add nothing."""
        total: Tensor | None = None
        for method, config, units in self.adapter_state.penalised:
            term = method.penalty(config, units)
            if term is not None:
                total = term if total is None else total + term.to(total.device)
        return total

    def _expect_penalties(self) -> None:
        """Tell the methods that `adapter_penalty` follows the call, and whether an engine has their units in shards."""
        # Only where there is a process group can there be shards.
        sharded = dist.is_available() and dist.is_initialized() and _is_sharded(self)
        for method, config, units in self.adapter_state.penalised:
            method.before_call(config, units, sharded)

    def _penalise(self, outputs: Any) -> Any:
        """`outputs` with the adapters' terms in their loss, if they name one; a tuple does not."""
        as_dict = isinstance(outputs, dict)
        loss = outputs.get("loss") if as_dict else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor) or isinstance(outputs, tuple):
            return outputs
        term = self.adapter_penalty()
        if term is not None:
            loss = loss + term.to(loss)
            if as_dict:
                outputs["loss"] = loss
            else:
                outputs.loss = loss
        return outputs


@torch.compiler.disable
def _is_sharded(model: nn.Module) -> bool:
    return sharding_of(model) is not None
