"""Which adapters a wrapped model has and which are at work: what every other part of it builds on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .. import attach
from ..config import AdapterConfig
from ..distributed.sharding import engine_of
from ..layer import adapted_layers
from ..method import METHODS, AdapterUnit, LayerMethod
from ..planning import Plan
from ..tokens import TokenUnit


@dataclass
class AdapterState:
    """Which adapters of a model are at work.

    Attributes:
        active: names of the active adapters, in order.
        enabled: False while adapters are disabled.
        merged: names of the adapters that are folded into the base weights.
        parts_before: what this rank held of the merged weights before, where an engine has sharded them.
        trained_before: names of the base parameters that required gradients before wrapping.
        arguments: further arguments of a call that the methods of active adapters take -> the units they are given to.
        prepended: how many virtual tokens the adapters at work put before each sequence that the model decodes.
        loads_without_base: while a state dict without the base is loaded, what is before the model's names in it.
        checked: whether ranks have made sure that they train the same.
        penalised: (method, configuration, units) of each adapter at work that adds a term to the loss.
    """

    active: list[str] = field(default_factory=list)
    enabled: bool = True
    merged: tuple[str, ...] = ()
    parts_before: list[tuple[Any, Tensor]] = field(default_factory=list)
    trained_before: frozenset[str] = frozenset()
    arguments: dict[str, tuple[AdapterUnit, ...]] = field(default_factory=dict)
    prepended: int = 0
    loads_without_base: str | None = None
    checked: bool = False
    penalised: tuple[tuple[type[LayerMethod], Any, tuple[AdapterUnit, ...]], ...] = ()


class WithAdapters(nn.Module):
    """Attributes of a wrapped model, and how they reach the layers.

    Attributes:
        peft_config: adapter name -> configuration, everything said outright.
        adapter_state: which adapters are at work.
    """

    peft_config: dict[str, AdapterConfig]
    adapter_state: AdapterState
    # transformers asks this before it writes a whole model or refuses to train a quantised one.
    _hf_peft_config_loaded: bool

    def add_planned(
        self, plan: Plan, name: str, *, trainable: bool, values: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Add the adapter that `plan` describes (see `planning.make_plan`), with `values` as in `attach.attach`."""
        self.check_not_merged("add an adapter")
        engine = engine_of(self)
        if engine is not None:
            raise RuntimeError(
                f"cannot add an adapter: {engine} has this model in hand, and would not see what is added now: wrap or "
                "load it first, then shard"
            )
        # First of all: an adapter may be fit to serve, but not to be trained.
        config = plan.config.replaced(inference_mode=not trainable)
        attach.attach(self, replace(plan, config=config), name, values)
        if config.base_model_name_or_path is None:
            config = config.replaced(base_model_name_or_path=getattr(self, "name_or_path", None) or None)
        if config.task_type is None:
            root = type(self)
            config = config.replaced(
                auto_mapping={"base_model_class": root.__name__, "parent_library": root.__module__}
            )
        self.peft_config[name] = config
        self.adapter_state.active = self.adapter_state.active or [name]
        self.refresh([name])

    def refresh(self, names: Sequence[str] | None = None) -> None:
        """Bring the layers in line with `adapter_state`, and so what is trained of the adapters `names` (or all)."""
        state = self.adapter_state
        at_work = state.merged or state.active
        attach.choose_live(self, at_work if state.enabled else (), merged=bool(state.merged))
        for name in self.peft_config if names is None else names:
            is_trained = name in state.active and not self.peft_config[name].inference_mode
            attach.set_trainable(self, name, is_trained)
        state.penalised = tuple(
            (METHODS[config.peft_type], config, tuple(self.units_of(name)))
            for name in (state.active if state.enabled and not state.merged else ())
            if METHODS[(config := self.peft_config[name]).peft_type].has_penalty and not config.inference_mode
        )
        methods = {name: METHODS[self.peft_config[name].peft_type] for name in (state.active if state.enabled else ())}
        # Units are asked for where they are needed alone: that is a walk through the model.
        state.prepended = sum(
            unit.prepended for name, method in methods.items() if method.prepends for unit in self.units_of(name)
        )
        state.arguments = {
            argument: tuple(self.units_of(name))
            for name, method in methods.items()
            for argument in method.call_arguments
        }

    def units_of(self, name: str) -> list[AdapterUnit]:
        """The units that the method of the adapter called `name` has put on layers, in the model's order."""
        found = [layer.unit(name) for _, layer in adapted_layers(self)]
        return [unit for unit in found if unit is not None and not isinstance(unit, TokenUnit)]

    def names_or_all(self, names: str | Sequence[str] | None) -> list[str]:
        """One name, several or None for all, as a list."""
        chosen = list(self.peft_config) if names is None else [names] if isinstance(names, str) else list(names)
        self.check_names(chosen)
        return chosen

    def check_names(self, names: Sequence[str], allow_none: bool = False) -> None:
        """Refuse names that no adapter has, or no names at all."""
        unknown = [name for name in names if name not in self.peft_config]
        if unknown or not (names or allow_none):
            had = ", ".join(map(repr, self.peft_config)) or "none"
            raise ValueError(f"no adapter is called {', '.join(map(repr, unknown)) or 'nothing'}; there are {had}")

    def check_not_merged(self, action: str, remedy: str = "unmerge_adapter() first") -> None:
        """Refuse `action` while adapters are merged."""
        if self.adapter_state.merged:
            raise RuntimeError(f"cannot {action}: {', '.join(self.adapter_state.merged)} is merged; {remedy}")


def forget_adapters(model: nn.Module) -> None:
    """Take off a model what wrapping has set on it."""
    for attribute in ("peft_config", "adapter_state", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)
