"""Putting one adapter onto a model's layers, taking it off, and choosing which adapters take part in forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import base_of
from .base.dense import Dense
from .biases import COPY, add_bias, biased_modules, choose_biases, copy_biases, remove_biases, rename_biases
from .distributed.drawing import drawn_alike
from .dtypes import adapter_dtype
from .integrations.transformers import is_transformers_model, mark_quantized
from .layer import (
    SavedModule,
    adapted_layers,
    add_copy,
    add_unit,
    base_modules,
    restore_layer,
    restore_module,
    saved_modules,
)
from .method import AdapterUnit
from .placement import copy_with, home_of, placed
from .planning import LayerPlan, Plan
from .tokens import TokenUnit


def check_adapter_name(name: str, taken: Sequence[str]) -> None:
    """Refuse a name that is in use, or that a module cannot have."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter name {name!r}: a non-empty string without dots is needed")
    if hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter name {name!r} is a method of torch.nn.ModuleDict; choose another")
    if name in taken:
        raise ValueError(f"there is an adapter called {name!r} already; delete it first or choose another name")


def attach(model: nn.Module, plan: Plan, name: str, values: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
    """Add the adapter that `plan` describes to `model` under `name`.

    All weights are made before the first layer is changed, so that running out of memory leaves the model as it was.

    Args:
        model: a wrapped model.
        plan: see `planning.make_plan`.
        name: of the new adapter.
        values: path of a layer, or of a module that is trained whole -> all its tensors, by what follows the path in a
            PEFT file. They become its parameters as they are: nothing is drawn, and nothing held twice.

    Ranks that a launcher started as one script draw the same values for an adapter that is trained.

    Raises:
        RankError: a rank did not come here.
        RuntimeError: a module that would be trained whole is offloaded, and `values` has none for it.
    """
    values = values or {}
    # An adapter that is not trained may be one rank's alone, and is read from a file.
    with contextlib.nullcontext() if plan.config.inference_mode else drawn_alike():
        units = _make_units(model, plan, values)
    every = [unit for _, _, unit in units]
    for unit in every:
        unit.join(every)
    # One memo for all copies keeps tied what is tied.
    memo: dict[int, Any] | None = {} if getattr(plan.config, "ensure_weight_tying", False) else None
    copies = [
        (model.get_submodule(path), _trainable_copy(model, path, values.get(path), {} if memo is None else memo))
        for path in plan.saved
    ]
    biases = copy_biases(model, list(plan.biases))
    for _, _, unit in units:
        unit.settle()
    # An adapter may have quantised its layers (LoftQ).
    now = [_host(plan, row, layer) for row, (layer, _, _) in zip(_in_order(plan), units, strict=True)]
    if any(kind is not base for kind, (_, base, _) in zip(now, units, strict=True)) and is_transformers_model(model):
        mark_quantized(model, [path for path, layer in base_modules(model) if base_of(layer) is Dense])
    try:
        for kind, (layer, _, unit) in zip(now, units, strict=True):
            add_unit(layer, kind, name, unit)
        for module, clone in copies:
            add_copy(module, name, clone)
        for module, bias in biases:
            add_bias(module, name, bias)
    except BaseException:
        detach(model, name)
        raise


def fill(model: nn.Module, name: str, values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give the units of an adapter values: path of the layer -> attribute -> tensor."""
    with torch.no_grad():
        for path, tensors in values.items():
            layer: Any = model.get_submodule(path)
            layer.unit(name).start_from(tensors, layer)


def detach(model: nn.Module, name: str) -> None:
    """Take the adapter called `name` off; a layer that has no other becomes a plain layer again."""
    for _, layer in list(adapted_layers(model)):
        if name in layer.adapters:
            layer.adapters.choose([other for other in layer.adapters.live_names if other != name])
            del layer.adapters[name]
            if not len(layer.adapters):
                restore_layer(layer)
    for _, module in list(saved_modules(model)):
        if name in module.copies:
            module.copies.choose([other for other in module.copies.live_names if other != name])
            del module.copies[name]
            if not len(module.copies):
                restore_module(module)
    remove_biases(model, name)


def rename(model: nn.Module, old: str, new: str) -> None:
    """Call the adapter `old` `new` on every layer; its place among the others stays."""
    for _, layer in adapted_layers(model):
        layer.adapters.rename(old, new)
    for _, module in saved_modules(model):
        module.copies.rename(old, new)
    rename_biases(model, old, new)


def check_together(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters that cannot be at work together on a layer that they share.

    Raises:
        ValueError: so it is; the layer is named.
    """
    for path, layer in adapted_layers(model):
        units = {name: unit for name in names if (unit := layer.unit(name)) is not None}
        for kind in {type(unit) for unit in units.values()}:
            try:
                kind.check_together(units)
            except ValueError as error:
                raise ValueError(f"{path}: {error}, so they cannot be at work together") from None


def choose_live(model: nn.Module, names: Sequence[str], *, merged: bool) -> None:
    """Let the named adapters, in order, take part in forward.

    Args:
        model: a wrapped model.
        names: the active adapters; empty for the base model.
        merged: whether their weights are in the base weights already, so that only whole modules and biases of their
            own still answer.
    """
    for _, layer in adapted_layers(model):
        layer.adapters.choose([] if merged else [name for name in names if name in layer.adapters])
    for _, module in saved_modules(model):
        live = module.copy_among(names)
        module.copies.choose([] if live is None else [live])
    choose_biases(model, names)


def adapter_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """Every parameter of the adapter called `name`."""
    for _, layer in adapted_layers(model):
        if name in layer.adapters:
            yield from layer.adapters[name].parameters()
    for _, module in saved_modules(model):
        if name in module.copies:
            yield from module.copies[name].parameters()
    for _, biased in biased_modules(model):
        copy_of_bias = biased._parameters.get(COPY + name)
        if copy_of_bias is not None:
            yield copy_of_bias


def set_trainable(model: nn.Module, name: str, trainable: bool) -> None:
    """Freeze or thaw the adapter called `name`."""
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)


def check_foldable(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters that no weight can take in.

    Raises:
        ValueError: so it is; nothing was changed.
    """
    for path, layer in adapted_layers(model):
        for name in names:
            unit = layer.unit(name)
            if unit is not None and not unit.folds:
                raise ValueError(
                    f"adapter {name!r} cannot be merged: what it adds at {path or 'the model'} is no change of a "
                    "weight; keep it beside the model, or name the adapters to merge"
                )


def _make_units(
    model: nn.Module, plan: Plan, values: Mapping[str, Mapping[str, Tensor]]
) -> list[tuple[nn.Module, Any, AdapterUnit]]:
    """(layer, what it is to the unit, unit) of each planned layer; those that follow another come last."""
    units: list[tuple[nn.Module, Any, AdapterUnit]] = []
    owners: dict[str, AdapterUnit] = {}
    for row in _in_order(plan):
        layer = model.get_submodule(row.path)
        base = _host(plan, row, layer)
        dtype = adapter_dtype(base.dtype(layer), plan.config.adapter_dtype)
        if row.source is None:
            home = home_of(layer, next(iter(base.stored(layer).values())))
            unit = _make_unit(plan, row, base, layer, home, dtype, values.get(row.path))
            if not plan.config.inference_mode:
                unit.start_training(plan.config)
            owners[row.path] = unit
        else:
            unit = row.unit_class(plan.config, row.source, base, layer, torch.device("meta"), dtype)
            unit.follow(owners[row.source], row.source)
        units.append((layer, base, unit.train(layer.training)))
    return units


def _in_order(plan: Plan) -> list[LayerPlan]:
    return sorted(plan.layers, key=lambda row: row.source is not None)


def _host(plan: Plan, row: LayerPlan, layer: nn.Module) -> Any:
    host = base_of(layer) if row.unit_class is TokenUnit else plan.method.host(layer)
    assert host is not None
    return host


def _make_unit(
    plan: Plan,
    row: LayerPlan,
    base: Any,
    layer: nn.Module,
    home: torch.device,
    dtype: torch.dtype,
    values: Mapping[str, Tensor] | None,
) -> AdapterUnit:
    device = home if values is None else torch.device("meta")
    unit = row.unit_class(plan.config, row.path, base, layer, device, dtype)
    if values is None:
        unit.initialize(plan.config, row.path, base, layer)
    else:
        for attribute, _ in list(unit.named_parameters(recurse=False)):
            value = placed(values[unit.file_keys[attribute]], home, dtype)
            setattr(unit, attribute, nn.Parameter(value))
    return unit


def _trainable_copy(
    model: nn.Module, path: str, values: Mapping[str, Tensor] | None, memo: dict[int, Any]
) -> nn.Module:
    try:
        clone = copy_with(model.get_submodule(path), values, memo)
    except RuntimeError as error:
        raise RuntimeError(f"modules_to_save: {path!r}: {error}") from None
    if isinstance(clone, SavedModule):
        restore_module(clone)
    remove_biases(clone)
    return clone.requires_grad_(True)
