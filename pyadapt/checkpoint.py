"""Adapter folders in the format of Hugging Face PEFT.

    adapter_config.json          the configuration
    adapter_model.safetensors    `base_model.model.<path of the layer>.<key of the method>`, no adapter name in it
    README.md                    a model card, where there is none yet

The adapter called "default" lies in the folder itself, any other in a folder of its name below it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import kohya
from .biases import COPY, biased_modules, is_bias_copy, own_bias
from .config import AdapterConfig
from .distributed.agreement import rank
from .distributed.sharding import sharding_of, whole, whole_shape, whole_under
from .files import (
    ADAPTER_WEIGHTS_FILE,
    AdapterFileError,
    Path,
    adapter_weights_path,
    read_tensors,
    resolve_adapter_folder,
    single_weights_file,
    write_safetensors,
    write_text,
)
from .layer import AdaptedLayer, SavedModule, adapted_layers, saved_modules, unwrapped
from .method import METHODS
from .placement import is_offloaded
from .planning import LayerPlan, Plan, make_plan
from .resuming import training_state, write_training_state
from .trained import without_wrappers
from .vocabulary import fill_weight, stored_weights, weight_places, without_repetitions

KEY_PREFIX = "base_model.model."
DEFAULT_ADAPTER = "default"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder that was read and found to fit a model.

    Attributes:
        plan: what its configuration means for the model.
        tensors: file key -> tensor, just those that the model has a place for.
        folder: where it was read.
    """

    plan: Plan
    tensors: dict[str, Tensor]
    folder: str = ""

    def values_of(self, row: LayerPlan) -> dict[str, Tensor]:
        """The tensors of one layer's unit, by what follows the layer's path in the file."""
        keys = {suffix: f"{KEY_PREFIX}{row.path}.{suffix}" for suffix in row.shapes}
        return {suffix: self.tensors[key] for suffix, key in keys.items() if key in self.tensors}

    def wholes(self, model: nn.Module, units: bool) -> dict[str, dict[str, Tensor]]:
        """What `attach` can take as it is: path -> the tensors of a unit or a module of which the file has all.

        Args:
            model: the one that the file was read for.
            units: whether those of layers are wanted, or just those of modules whose own weights are elsewhere.
        """
        found = {}
        for row in self.plan.layers:
            if units and row.source is None and not row.unit_class.needs_start(self.plan.config):
                found[row.path] = {suffix: f"{KEY_PREFIX}{row.path}.{suffix}" for suffix in row.shapes}
        for path in self.plan.saved:
            module = model.get_submodule(path)
            if units or is_offloaded(module):
                found[path] = {suffix: f"{KEY_PREFIX}{path}.{suffix}" for suffix, _ in _own_state(module)}
        return {
            path: {suffix: self.tensors[key] for suffix, key in keys.items()}
            for path, keys in found.items()
            if self.tensors.keys() >= set(keys.values())
        }

    def besides(self, wholes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that are not in `wholes`, by their keys in the file."""
        taken = {f"{KEY_PREFIX}{path}.{suffix}" for path, tensors in wholes.items() for suffix in tensors}
        return {key: tensor for key, tensor in self.tensors.items() if key not in taken}

    def beside_units(self) -> dict[str, Tensor]:
        """The tensors that belong to no layer's unit, by their keys in the file."""
        of_units = {f"{KEY_PREFIX}{row.path}.{suffix}" for row in self.plan.layers for suffix in row.shapes}
        return {key: tensor for key, tensor in self.tensors.items() if key not in of_units}


def adapter_state_dict(
    model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of one adapter under their keys in a PEFT file.

    Args:
        model: a wrapped model. Where it is sharded and no state dict is given, every rank has to come here.
        name: the adapter.
        state_dict: the whole model's state dict where an engine has gathered it; by default the live parameters, of
            which copies on the CPU are gathered where they are sharded.
    """
    if state_dict is not None:
        return _from_state_dict(model, name, state_dict)
    sharded = sharding_of(model) is not None
    found: dict[str, Tensor] = {}
    for key, tensor in _places(model, name):
        found[key] = _copied(tensor) if sharded else tensor
    found.update(_mirrors(model, name, found))
    for key, (_, module, tensor) in stored_weights(model, name).items():
        if f"{KEY_PREFIX}{key}" not in found:
            with whole(model, [module]):
                found[f"{KEY_PREFIX}{key}"] = _copied(module.weight) if sharded else tensor
    return found


def _from_state_dict(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`adapter_state_dict` out of the state dict of the whole model."""
    # DDP puts a name of its own before those of the model.
    given = {without_wrappers(own_name).removeprefix("module."): value for own_name, value in state_dict.items()}
    if not given:
        raise AdapterFileError(
            f"the state dict to save from, on rank {rank()}, is empty: leave the argument out, on every rank, and what "
            "is needed is gathered. Trainer and accelerate give an empty one where DeepSpeed's configuration lacks "
            '"stage3_gather_16bit_weights_on_model_save": true'
        )
    found: dict[str, Tensor] = {}
    for key, own_name in _names(model, name, given):
        if own_name not in given:
            raise AdapterFileError(
                f"the state dict to save from, on rank {rank()}, lacks {own_name}: leave the argument out, on every "
                "rank, and what is needed is gathered"
            )
        found[key] = given[own_name]
    found.update(_mirrors(model, name, found))
    for key, (own_name, _, _) in stored_weights(model, name).items():
        if own_name in given:
            found.setdefault(f"{KEY_PREFIX}{key}", given[own_name])
    return found


def _copied(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor.detach())


def as_in_file(model: Any, name: str, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter as `adapter_state_dict` gives them, under the keys that its method gives files."""
    config, tensors = model.peft_config[name], adapter_state_dict(model, name, state_dict)
    method = METHODS[config.peft_type]
    return method.as_saved(model, name, config, tensors, KEY_PREFIX)[1] if method.has_own_keys else tensors


def save_adapter(
    model: nn.Module,
    folder: Path,
    name: str,
    config: AdapterConfig,
    state_dict: Mapping[str, Tensor] | None = None,
    as_plain_lora: bool = False,
    writes: bool = True,
) -> None:
    """Write one adapter below `folder`; each file appears whole or not at all.

    Where the model is sharded and no state dict is given, every rank has to come here; those without `writes` help to
    gather.

    Raises:
        AdapterFileError: a tensor has no values here (it is on the meta device, or another process holds it).
        ValueError: `as_plain_lora` of an adapter that cannot be one; see `LayerMethod.as_plain_lora`.
    """
    tensors = adapter_state_dict(model, name, state_dict)
    if not writes:
        return
    empty = _empty_by_rights(model, name, config)
    for key, tensor in tensors.items():
        if tensor.is_meta or (tensor.numel() == 0 and tuple(tensor.shape) != empty.get(key)):
            state = "on the meta device" if tensor.is_meta else f"of shape {tuple(tensor.shape)}"
            raise AdapterFileError(
                f"cannot save adapter {name!r}: {key} is {state} on rank {rank()}, and not whole; call save_pretrained "
                "on every rank, without a state dict, and it is gathered"
            )
    method = METHODS[config.peft_type]
    config, tensors = method.as_saved(model, name, config, tensors, KEY_PREFIX)
    if as_plain_lora:
        config, tensors = method.as_plain_lora(model, name, config, tensors, KEY_PREFIX)
        tensors.update(_mirrors(model, name, tensors))
    target = os.path.join(folder, "" if name == DEFAULT_ADAPTER else name)
    os.makedirs(target, exist_ok=True)
    write_safetensors(os.path.join(target, ADAPTER_WEIGHTS_FILE), tensors)
    config.save_pretrained(target)
    write_training_state(target, {} if as_plain_lora else training_state(model, name, state_dict))
    card = os.path.join(target, "README.md")
    if not os.path.exists(card):
        write_text(card, _model_card(config))


def _empty_by_rights(model: nn.Module, name: str, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of each tensor that has no values because its layer has no rank."""
    units = ((path, layer, unit) for path, layer in adapted_layers(model) if (unit := layer.unit(name)) is not None)
    return {
        f"{KEY_PREFIX}{path}.{unit.file_keys[attribute]}": shape
        for path, layer, unit in units
        if any(parameter.numel() == 0 for parameter in unit.parameters())
        for attribute, shape in unit.shapes(config, path, layer.base, layer).items()
        if 0 in shape
    }


def read_adapter(
    model: nn.Module,
    path: Path,
    *,
    strict: bool = True,
    adapter_dtype: Any = None,
    prefix: str | None = None,
    **hub: str,
) -> AdapterFile:
    """Read the adapter in `path` and check it against `model`, changing nothing.

    Args:
        model: the model.
        path: the folder, a name on the hub, or a single file of kohya's or LyCORIS' (see `kohya`).
        strict: refuse files with missing, extra or misshapen tensors.
        adapter_dtype: what the adapter is to be held in, as in a configuration; files do not say it.
        prefix: in a single file, what the keys to take begin with, where more than one would fit.
        hub: `revision`, `token`, `cache_dir` for a hub name.

    Raises:
        AdapterFileError: files missing or damaged; or, with `strict`, tensors missing, extra or misshapen, all listed.
        ValueError: the configuration does not fit the model.
    """
    single = single_weights_file(path)
    folder = single or resolve_adapter_folder(path, **hub)
    config = None if single else AdapterConfig.from_pretrained(folder).replaced(adapter_dtype=adapter_dtype)
    tensors = read_tensors(single or adapter_weights_path(folder))
    if config is None:
        try:
            config, tensors = kohya.read(model, tensors, KEY_PREFIX, prefix, strict)
        except ValueError as error:
            raise _does_not_fit(f"in {folder}", model, f" {error}") from error
        config = config.replaced(adapter_dtype=adapter_dtype)
    return replace(fitted(model, config, tensors, f"in {folder}", strict), folder=folder)


def fitted(
    model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor], where: str, strict: bool = True
) -> AdapterFile:
    """What a file with `config` and `tensors` means for `model`, checked; nothing is changed.

    Args:
        model: the model.
        config: the file's configuration.
        tensors: the file's tensors by key.
        where: what is said of the adapter in errors: where it comes from.
        strict: refuse missing, extra or misshapen tensors.

    Raises:
        AdapterFileError: the configuration or, with `strict`, the tensors do not fit.
    """
    try:
        config, tensors = METHODS[config.peft_type].read(model, config, tensors, KEY_PREFIX)
        plan = make_plan(model, config, trained=False)
    except ValueError as error:
        raise _does_not_fit(where, model, f" {error}") from error
    wanted = dict(_expected_shapes(model, plan))
    tensors = without_repetitions(model, _under_present_keys(tensors, plan), KEY_PREFIX)
    for key, module in weight_places(model).items():
        if f"{KEY_PREFIX}{key}" in tensors:
            wanted.setdefault(f"{KEY_PREFIX}{key}", whole_shape(module.weight))
    again = _held_again(model, plan, tensors)
    problems = [
        f"  differs:   {key} is a second copy of a tied weight, but has other values than the first"
        for key, value in again.items()
        if key in tensors and not value.is_meta and not torch.equal(tensors[key], value)
    ]
    wanted = {key: shape for key, shape in wanted.items() if key not in again}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in again}
    problems += _differences(wanted, tensors)
    if problems and strict:
        raise _does_not_fit(where, model, "\n" + "\n".join(problems))
    fitting = {key: tensor for key, tensor in tensors.items() if wanted.get(key) == tuple(tensor.shape)}
    return AdapterFile(plan, fitting)


def check_values(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not just those of the adapter called `name`, under their file keys.

    Raises:
        AdapterFileError: tensors missing, extra or misshapen, all listed.
    """
    own = {key: torch.empty(place.shape, device="meta") for key, place in _places(model, name)}
    wanted = {key: tuple(place.shape) for key, place in {**own, **_mirrors(model, name, own)}.items()}
    beside = {f"{KEY_PREFIX}{key}" for key in weight_places(model)} - wanted.keys()
    problems = _differences(wanted, {key: tensor for key, tensor in tensors.items() if key not in beside})
    if problems:
        raise AdapterFileError(f"these are not the tensors of adapter {name!r}:\n" + "\n".join(problems))


def fill_adapter(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, under their file keys, into the adapter called `name`.

    Raises:
        AdapterFileError: their places are on the meta device, where values are lost; nothing was copied.
    """
    lost = [key for key, place in _places(model, name) if place.is_meta and key in tensors]
    if lost:
        raise AdapterFileError(
            f"adapter {name!r} cannot be filled, for the model has no values itself, and so neither has "
            f"{', '.join(lost)}: load the model first, or pass low_cpu_mem_usage=True to keep what the file holds"
        )
    filled = set()
    with torch.no_grad():
        for key, place in _places(model, name, write=True):
            filled.add(key)
            if key in tensors:
                place.copy_(tensors[key])
    for below, module in weight_places(model).items():
        key = f"{KEY_PREFIX}{below}"
        if key in tensors and key not in filled:
            with whole(model, [module], write=True):
                fill_weight(key, module.weight, tensors[key])


def _does_not_fit(where: str, model: nn.Module, why: str) -> AdapterFileError:
    return AdapterFileError(f"the adapter {where} does not fit this {type(model).__name__}:{why}")


def _places(model: nn.Module, name: str, write: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(key in a file, the live tensor) of all that belongs to an adapter.

    Where the model is sharded, each tensor is whole until the next is asked for, and every rank has to go through all
    of them; `write` is that of `Sharding.whole`.
    """
    sharding = sharding_of(model)
    for path, layer in adapted_layers(model):
        unit = layer.unit(name)
        if unit is None or unit.source is not None:
            continue
        with whole_under(sharding, [unit], write):
            for attribute, parameter in unit.named_parameters(recurse=False):
                yield f"{KEY_PREFIX}{path}.{unit.file_keys[attribute]}", parameter
    for path, module in saved_modules(model):
        if name in module.copies:
            copy = unwrapped(module.copies[name])
            with whole_under(sharding, list(copy.modules()), write):
                for key, tensor in copy.state_dict(keep_vars=True).items():
                    yield f"{KEY_PREFIX}{path}.{key}", tensor
    for path, biased in biased_modules(model):
        if COPY + name in biased._parameters:
            with whole_under(sharding, [biased], write):
                adapted = isinstance(biased, AdaptedLayer) and biased.unit(name) is not None
                yield _bias_key(path, adapted), biased.get_parameter(COPY + name)


def _names(model: Any, name: str, given: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(key in a file, name in the model's state dict) of all that belongs to an adapter; no rank waits for another.

    Args:
        model: a wrapped model.
        name: the adapter.
        given: names in a state dict; it says what a module that is trained whole has in it.
    """
    for path, layer in adapted_layers(model):
        unit = layer.unit(name)
        if unit is not None and unit.source is None:
            # Not from the unit itself, whose parameters an engine may have put elsewhere.
            for attribute in unit.shapes(model.peft_config[name], path, layer.base, layer):
                yield (
                    f"{KEY_PREFIX}{path}.{unit.file_keys[attribute]}",
                    f"{path}.adapters.{name}.{attribute}".lstrip("."),
                )
    for path, module in saved_modules(model):
        if name in module.copies:
            start = f"{path}.copies.{name}."
            for own_name in [own_name for own_name in given if own_name.startswith(start)] or [f"{start}weight"]:
                yield f"{KEY_PREFIX}{path}.{own_name.removeprefix(start)}", own_name
    for path, biased in biased_modules(model):
        if COPY + name in biased._parameters:
            adapted = isinstance(biased, AdaptedLayer) and biased.unit(name) is not None
            yield _bias_key(path, adapted), f"{path}.{COPY}{name}".lstrip(".")


def _mirrors(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `tensors`, those of an adapter under their file keys, hold once more for layers that follow another."""
    found = {}
    for path, layer in adapted_layers(model):
        unit = layer.unit(name)
        if unit is None or unit.source is None or not unit.writes_mirror:
            continue
        owner: Any = model.get_submodule(unit.source)
        first = owner.unit(name)
        suffixes = list(first.by_file_key())
        values = unit.mirrored({suffix: tensors[f"{KEY_PREFIX}{unit.source}.{suffix}"] for suffix in suffixes})
        found.update({f"{KEY_PREFIX}{path}.{suffix}": value.contiguous() for suffix, value in values.items()})
    return found


def _held_again(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys under which a file may hold tied tensors once more -> what they have to be; meta where that is missing."""
    again: dict[str, Tensor] = {}
    rows = {row.path: row for row in plan.layers}
    for row in plan.layers:
        if row.source is not None:
            values = {
                suffix: tensors.get(f"{KEY_PREFIX}{row.source}.{suffix}", torch.empty(shape, device="meta"))
                for suffix, shape in rows[row.source].shapes.items()
            }
            mirrored = row.unit_class.mirrored(values)
            again.update({f"{KEY_PREFIX}{row.path}.{suffix}": value for suffix, value in mirrored.items()})
    first: dict[int, str] = {}
    for path in plan.saved if getattr(plan.config, "ensure_weight_tying", False) else ():
        for name, tensor in model.get_submodule(path).state_dict(keep_vars=True).items():
            key = f"{KEY_PREFIX}{path}.{name}"
            of = first.setdefault(id(tensor), key)
            if of != key:
                again[key] = tensors.get(of, torch.empty(tensor.shape, device="meta"))
    return again


def _expected_shapes(model: nn.Module, plan: Plan) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in plan.layers:
        for suffix, shape in layer.shapes.items():
            yield f"{KEY_PREFIX}{layer.path}.{suffix}", shape
    for path in plan.saved:
        module = model.get_submodule(path)
        for key, tensor in _own_state(module):
            yield f"{KEY_PREFIX}{path}.{key}", whole_shape(tensor)
    adapted = {layer.path for layer in plan.layers}
    for path in plan.biases:
        yield _bias_key(path, path in adapted), whole_shape(own_bias(model.get_submodule(path)))


def _own_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a module without what adapters have put on it."""
    for key, tensor in module.state_dict(keep_vars=True).items():
        if not (isinstance(module, SavedModule) and key.startswith("copies.")) and not is_bias_copy(key):
            yield key, tensor


def _bias_key(path: str, adapted: bool) -> str:
    """The key of a trained bias; PEFT's adapted layers hold the layer they adapt inside."""
    return f"{KEY_PREFIX}{path}.base_layer.bias" if adapted else f"{KEY_PREFIX}{path}.bias".replace("..", ".")


def _under_present_keys(tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The tensors of a file under the keys that are written today, without what PEFT adds by mistake."""
    renamed = {
        f"{KEY_PREFIX}{row.path}.{old}": f"{KEY_PREFIX}{row.path}.{new}"
        for row in plan.layers
        for old, new in row.unit_class.file_aliases.items()
    }
    # With bias="all" PEFT writes the biases in modules that are trained whole three times: the original, and the copy
    # under two keys.
    again = tuple(f"{KEY_PREFIX}{path}.{of}." for path in plan.saved for of in ("original_module", "modules_to_save"))
    if not (plan.biases and again):
        again = ()
    return {renamed.get(key, key): tensor for key, tensor in tensors.items() if not key.startswith(again)}


def _differences(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> list[str]:
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    misshapen = sorted(key for key in wanted.keys() & tensors.keys() if tuple(tensors[key].shape) != wanted[key])
    return [
        *(f"  missing:   {key} {wanted[key]}" for key in missing),
        *(f"  extra:     {key} {tuple(tensors[key].shape)}" for key in extra),
        *(f"  misshapen: {key} is {tuple(tensors[key].shape)}, the model needs {wanted[key]}" for key in misshapen),
    ]


def _model_card(config: AdapterConfig) -> str:
    base = config.base_model_name_or_path
    front = ["library_name: peft", f"tags:\n- {config.peft_type.lower()}\n- pyadapt"]
    if base:
        front.insert(0, f"base_model: {base}")
    header = "\n".join(["---", *front, "---"])
    told = f"A {config.peft_type} adapter for `{base}`." if base else f"A {config.peft_type} adapter."
    return f"{header}\n\n# Adapter\n\n{told} Made with pyadapt; `peft` and `pyadapt.load` both read it.\n"
