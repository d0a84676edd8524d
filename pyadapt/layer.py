"""What an adapted layer can do more, and what a module that is trained whole does otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .base import Host, Operands, base_of
from .method import AdapterUnit
from .rows import Rows
from .surgery import adopt, release

# Under these names wrappers of FSDP1, torch.compile and activation checkpointing have the module inside.
WRAPPED = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


class LiveDict(nn.ModuleDict):
    """A `ModuleDict` that knows which of its entries are at work.

    `live` holds the modules themselves, not their names: torch.compile guards on a name and would compile again at each
    switch, while another module of the same shapes passes.

    Attributes:
        live: the entries at work.
        live_names: their names.
        alone: `live` where that is one entry whose forward is all that is called (see `AdapterUnit.run`), else empty.
        rows: set for the length of a call whose rows each have an adapter of their own; then `live` does not count.
    """

    live: tuple[nn.Module, ...]
    live_names: tuple[str, ...]
    alone: tuple[nn.Module, ...]
    rows: Rows | None

    def __init__(self) -> None:
        super().__init__()
        self.live, self.live_names, self.alone, self.rows = (), (), (), None

    def choose(self, names: Sequence[str]) -> None:
        """Let the entries called `names`, in order, be at work."""
        self.live_names = tuple(names)
        self.live = tuple(self[name] for name in names)
        is_plain = len(self.live) == 1 and getattr(type(self.live[0]), "run", None) is AdapterUnit.run
        self.alone = self.live if is_plain else ()

    def rename(self, old: str, new: str) -> None:
        """Call the entry `old`, if there is one, `new`; the order stays."""
        live = [new if name == old else name for name in self.live_names]
        entries = {(new if name == old else name): entry for name, entry in self.items()}
        self.choose([])
        self.clear()
        self.update(entries)
        self.choose(live)

    def __setattr__(self, name: str, value: Any) -> None:
        """FSDP1 puts a wrapper into the place of an entry in this way; the wrapper is then what is at work."""
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and name in self.live_names:
            self.choose(self.live_names)


class AdaptedLayer(nn.Module):
    """Mixin of a layer that carries adapters: `adapters`, one `AdapterUnit` a name, beside its `weight`.

    Attributes:
        adapters: the units by adapter name, and which of them take part in forward; none means the plain layer.
        base: the kind of frozen weight (a `BaseWeight`), or another kind of `Host`.
        unmerged: the stored weight from before a merge, so that unmerging is exact; None when nothing is merged.
    """

    adapters: LiveDict
    base: Any
    unmerged: dict[str, Any] | None
    # The attribute that answers as `bias` while a trained copy does (see `biases`).
    live_bias: str | None = None
    # Further attributes that a layer has while it carries adapters, with their first values.
    further: ClassVar[Mapping[str, Any]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward with its live adapters in it."""
        adapters: Any = self._modules["adapters"]
        if adapters.alone and adapters.rows is None and not kwargs:
            return adapters.alone[0](*args, self)
        live: Any = adapters.live if adapters.rows is None else adapters.rows.units
        if not live:
            return super().forward(*args, **kwargs)
        if adapters.rows is not None:
            return live[0].run_by_row(adapters.rows, self, *args, **kwargs)
        return live[0].run(live, self, *args, **kwargs)

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, without adapters."""
        return super().forward(*args, **kwargs)

    def operands(self) -> Operands:
        """The frozen weight, its scale and the bias, for a kernel to read now."""
        return self.base.operands(self)

    def unit(self, name: str) -> AdapterUnit | None:
        """The unit of the adapter called `name`, or None."""
        if name not in self.adapters:
            return None
        return cast(AdapterUnit, unwrapped(self.adapters[name]))


def add_unit(layer: nn.Module, base: type[Host], name: str, unit: AdapterUnit) -> None:
    """Put `unit` on `layer` under `name`, making it an adapted layer if it is not one yet."""
    if not isinstance(layer, AdaptedLayer):
        layer = cast(AdaptedLayer, adopt(layer, base.mixin or AdaptedLayer))
        layer.adapters = LiveDict().train(layer.training)
        layer.base, layer.unmerged = base, None
        for attribute, value in layer.further.items():
            setattr(layer, attribute, value)
    layer.adapters[name] = unit


def restore_layer(layer: AdaptedLayer) -> None:
    """Make an adapted layer what it was before; its weight stays as it is now."""
    for name in layer.further:
        delattr(layer, name)
    release(layer, AdaptedLayer)
    del layer.adapters, layer.base, layer.unmerged


class SavedModule(nn.Module):
    """Mixin of a module that adapters train whole: `copies` holds one trained copy an adapter.

    The module's own parameters stay frozen and in place, so that disabling and unwrapping give the base model back.
    The copy at work answers for the module; without one it answers itself.
    """

    copies: LiveDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the live copy."""
        copies = self.copies
        if copies.rows is not None:
            return self._by_row(copies.rows, *args, **kwargs)
        return copies.live[0](*args, **kwargs) if copies.live else super().forward(*args, **kwargs)

    def _by_row(self, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = super().forward
        return rows.split(lambda i, part: (own if i < 0 else rows.units[i])(part, *args, **kwargs), x)

    def copy_among(self, names: Sequence[str]) -> str | None:
        """The first of the adapters `names` that trains this module, which is the one whose copy answers."""
        return next((name for name in names if name in self.copies), None)


def add_copy(module: nn.Module, name: str, copy: nn.Module) -> None:
    """Let `copy` answer for `module` when the adapter called `name` is live."""
    if not isinstance(module, SavedModule):
        module = adopt(module, SavedModule)
        module.copies = LiveDict().train(module.training)
    module.copies[name] = copy


def restore_module(module: SavedModule) -> None:
    """Make a saved module what it was before."""
    release(module, SavedModule)
    del module.copies


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside the wrappers that FSDP1, torch.compile and activation checkpointing put around a module."""
    while True:
        inner = next((module._modules[name] for name in WRAPPED if name in module._modules), None)
        if inner is None:
            return module
        module = inner


def base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the user's own modules, in the model's order: the root and all but what adapters have added.

    Paths are those from before an engine put wrappers around modules.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()

    # Not named_modules: with many adapters most modules are units, which would be visited to be passed over.
    def visit(path: str, module: nn.Module) -> None:
        module = unwrapped(module)
        seen.add(module)
        found.append((path, module))
        for name, child in module._modules.items():
            if child is not None and child not in seen and not isinstance(child, LiveDict):
                visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return found


def dense_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first parameter of the base that is floating and no quantised weight, or None."""
    for _, module in base_modules(model):
        base = base_of(module)
        quantised = base.stored(module) if base is not None and base.quantized else {}
        for name, parameter in module.named_parameters(recurse=False):
            if name not in quantised and parameter.is_floating_point():
                return parameter.dtype
    return None


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """(path, layer) of each adapted layer, in the model's order."""
    return [(path, module) for path, module in base_modules(model) if isinstance(module, AdaptedLayer)]


def saved_modules(model: nn.Module) -> list[tuple[str, SavedModule]]:
    """(path, module) of each module that some adapter trains whole."""
    return [(path, module) for path, module in base_modules(model) if isinstance(module, SavedModule)]
