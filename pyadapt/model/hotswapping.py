"""Putting another adapter's weights into the place of one that is at work, without wrapping or compiling again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import attach, checkpoint
from ..checkpoint import AdapterFile
from ..config import AdapterConfig
from ..files import Path
from ..layer import adapted_layers
from ..method import METHODS, AdapterUnit
from ..planning import Plan, make_plan

if TYPE_CHECKING:
    from .adapters import AdapterVerbs

# What an adapter trains beside its units: two adapters that differ in it do not fit into each other's place.
_BESIDE_UNITS = ("modules_to_save", "bias", "trainable_token_indices", "ensure_weight_tying")


def hotswap(model: AdapterVerbs, name: str, path: Path, strict: bool = True, **hub: str) -> bool:
    """Give the adapter called `name` the weights of the adapter in `path`.

    Where the new weights fit into the shapes of the old ones, the parameters stay the same objects and compiled code
    stays valid: lower ranks are padded with zeros, and another scaling is multiplied into the weights, so that the
    configuration of the adapter stays true. A layer that the new adapter leaves out goes back to its first values,
    with which it does nothing. Where something does not fit, the adapter is loaded anew under its old name.

    Returns:
        Whether everything fitted.

    Raises:
        AdapterFileError: the files are missing, damaged or do not fit; the model is unchanged.
    """
    return _swap(model, name, checkpoint.read_adapter(model, path, strict=strict, **hub))


def set_values(model: AdapterVerbs, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give the adapter called `name` the values of `tensors`, by their keys in a file.

    A prompt that something makes (P-tuning, a prefix with its MLP) is finished in a file, and so from then on here.

    Raises:
        AdapterFileError: keys are missing, extra or misshapen; the model is unchanged.
    """
    config = model.peft_config[name]
    if METHODS[config.peft_type].has_own_keys:
        _swap(model, name, checkpoint.fitted(model, config, dict(tensors), "of these values"))
        return
    checkpoint.check_values(model, name, tensors)
    checkpoint.fill_adapter(model, name, tensors)


def _swap(model: AdapterVerbs, name: str, read: AdapterFile) -> bool:
    """Give the adapter called `name` what was read, in place where it fits; whether it did."""
    old, new = model.peft_config[name], read.plan.config
    units = _units(model, name)
    values = {row.path: read.values_of(row) for row in read.plan.layers if row.source is None}
    fits = _same_beside_units(old, new) and all(
        layer_path in units and units[layer_path].can_take(tensors, new) for layer_path, tensors in values.items()
    )
    if not fits:
        _load_anew(model, name, read)
        return False
    checkpoint.fill_adapter(model, name, read.beside_units())
    with torch.no_grad():
        for layer_path, unit in units.items():
            if layer_path in values:
                unit.take(values[layer_path], new, layer_path)
            else:
                layer: Any = model.get_submodule(layer_path)
                # Without a start of its own (PiSSA), an adapter's first values do nothing.
                at_rest = old.replaced(init_lora_weights=True, init_weights=True)
                unit.initialize(at_rest, layer_path, layer.base, layer)
    return True


def _same_beside_units(old: AdapterConfig, new: AdapterConfig) -> bool:
    return type(old) is type(new) and all(getattr(old, key, None) == getattr(new, key, None) for key in _BESIDE_UNITS)


def pad_ranks(model: AdapterVerbs, rank: int) -> None:
    """Raise the rank of every adapter to `rank` with zeros; scalings and outputs stay.

    Raises:
        ValueError: an adapter has no rank, a higher one, or weights that zeros cannot lengthen; the model is unchanged.
    """
    places: dict[str, str] = {}
    try:
        for name, config in list(model.peft_config.items()):
            if not hasattr(config, "with_rank"):
                raise ValueError(f"adapter {name!r} is a {config.peft_type}, which has no rank to pad")
            old = _units(model, name)
            plan = make_plan(model, config.with_rank(rank, list(old)), trained=False)
            places[name] = _add_beside(model, name, plan)
            new = _units(model, places[name])
            for path, unit in old.items():
                if not new[path].can_take(unit.by_file_key(), config):
                    had = {key: tuple(value.shape) for key, value in unit.by_file_key().items()}
                    raise ValueError(f"adapter {name!r} on {path} cannot be padded to rank {rank}: it has {had}")
                with torch.no_grad():
                    new[path].take(unit.by_file_key(), config, path)
            own = checkpoint.adapter_state_dict(model, name)
            checkpoint.fill_adapter(model, places[name], AdapterFile(plan, own).beside_units())
    except BaseException:
        for beside in places.values():
            model.delete_adapter(beside)
        raise
    for name, beside in places.items():
        _take_the_place(model, name, beside)


def _load_anew(model: AdapterVerbs, name: str, read: AdapterFile) -> None:
    beside = _add_beside(model, name, read.plan)
    checkpoint.fill_adapter(model, beside, read.tensors)
    _take_the_place(model, name, beside)


def _add_beside(model: AdapterVerbs, name: str, plan: Plan) -> str:
    """Add what is to replace an adapter under a free name: if that fails, the old one is still there."""
    beside = f"{name}_next"
    while beside in model.peft_config:
        beside += "_"
    model.add_planned(plan, beside, trainable=not model.peft_config[name].inference_mode)
    return beside


def _take_the_place(model: AdapterVerbs, name: str, beside: str) -> None:
    attach.detach(model, name)
    attach.rename(model, beside, name)
    model.peft_config[name] = model.peft_config.pop(beside)
    model.refresh()


def _units(model: AdapterVerbs, name: str) -> dict[str, AdapterUnit]:
    return {path: unit for path, layer in adapted_layers(model) if (unit := layer.unit(name)) and not unit.source}
