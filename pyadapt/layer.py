"""What an adapted layer can do more, and what a module that is trained whole does otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .base import BaseWeight, Operands
from .method import AdapterUnit
from .surgery import adopt, release


class AdaptedLayer(nn.Module):
    """Mixin of a linear layer that carries adapters: `adapters`, one `AdapterUnit` a name, beside its `weight`.

    Attributes:
        live: names of the adapters that take part in forward, in order; empty means the plain layer.
        base: the kind of frozen weight.
        unmerged: the stored weight from before a merge, so that unmerging is exact; None when nothing is merged.
    """

    adapters: nn.ModuleDict
    live: tuple[str, ...]
    base: type[BaseWeight]
    unmerged: dict[str, Tensor] | None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        if not self.live:
            return super().forward(x)
        y: Tensor | None = None
        for name in self.live:
            # The unit gets the layer, not its weight: a tensor that crosses a module boundary is kept alive
            # in full by ZeRO-3's hooks.
            y = self.adapters[name](x, self, y)
        assert y is not None
        return y

    def operands(self) -> Operands:
        """The frozen weight, its scale and the bias, for a kernel to read now."""
        return self.base.operands(self)

    def delta(self, names: tuple[str, ...]) -> Tensor | None:
        """What the named adapters add to the weight, (N, K), or None if none of them is on this layer."""
        deltas = [unit.delta() for name in names if (unit := self.unit(name)) is not None]
        return torch.stack(deltas).sum(0) if len(deltas) > 1 else (deltas[0] if deltas else None)

    def unit(self, name: str) -> AdapterUnit | None:
        """The unit of the adapter called `name`, or None."""
        if name not in self.adapters:
            return None
        return cast(AdapterUnit, self.adapters[name])


def add_unit(layer: nn.Module, base: type[BaseWeight], name: str, unit: AdapterUnit) -> None:
    """Put `unit` on `layer` under `name`, making it an adapted layer if it is not one yet."""
    if not isinstance(layer, AdaptedLayer):
        layer = adopt(layer, AdaptedLayer)
        layer.adapters = nn.ModuleDict().train(layer.training)
        layer.live, layer.base, layer.unmerged = (), base, None
    layer.adapters[name] = unit


def restore_layer(layer: AdaptedLayer) -> None:
    """Make an adapted layer what it was before; its weight stays as it is now."""
    release(layer, AdaptedLayer)
    del layer.adapters, layer.live, layer.base, layer.unmerged


class SavedModule(nn.Module):
    """Mixin of a module that adapters train whole: `copies` holds one trained copy an adapter.

    The module's own parameters stay frozen and in place, so that disabling and unwrapping give the base model back.

    Attributes:
        live_copy: the adapter whose copy answers for the module; None means the module itself.
    """

    copies: nn.ModuleDict
    live_copy: str | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the live copy."""
        if self.live_copy is None:
            return super().forward(*args, **kwargs)
        return self.copies[self.live_copy](*args, **kwargs)

    def copy_among(self, names: Sequence[str]) -> str | None:
        """The first of the adapters `names` that trains this module, which is the one whose copy answers."""
        return next((name for name in names if name in self.copies), None)


def add_copy(module: nn.Module, name: str, copy: nn.Module) -> None:
    """Let `copy` answer for `module` when the adapter called `name` is live."""
    if not isinstance(module, SavedModule):
        module = adopt(module, SavedModule)
        module.copies = nn.ModuleDict().train(module.training)
        module.live_copy = None
    module.copies[name] = copy


def restore_module(module: SavedModule) -> None:
    """Make a saved module what it was before."""
    release(module, SavedModule)
    del module.copies, module.live_copy


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the user's own modules: the root and all but what adapters have added."""
    added: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in added:
            continue
        yield path, module
        for container in (module.__dict__["_modules"].get(name) for name in ("adapters", "copies")):
            if container is not None and isinstance(module, (AdaptedLayer, SavedModule)):
                added.update(container.modules())


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """(path, layer) of each adapted layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """(path, module) of each module that some adapter trains whole."""
    for path, module in model.named_modules():
        if isinstance(module, SavedModule):
            yield path, module
