"""Which modules of a wrapped model are units of their own under FSDP1, and which settings of FSDP cannot work.

A unit has one flat parameter. So all that is in it has one dtype, none of it is an integer, no other unit has a part of
it, and its frozen values are given gradients where anything in it is trained.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base import base_of
from ..layer import adapted_layers, saved_modules
from ..method import AdapterUnit
from ..tying import input_embedding


@dataclass(frozen=True)
class Fsdp1Settings:
    """How FSDP1 is going to be started.

    Attributes:
        use_orig_params: its option of that name.
        classes: names of the classes whose modules are units (accelerate's `fsdp_transformer_layer_cls_to_wrap`); None
            for `fsdp_auto_wrap_policy`.
        param_dtype: that of its MixedPrecision, or None.
    """

    use_orig_params: bool = True
    classes: tuple[str, ...] | None = None
    param_dtype: torch.dtype | None = None


def fsdp_auto_wrap_policy(model: nn.Module, classes: Iterable[str] | None = None) -> Callable[..., bool]:
    """The `auto_wrap_policy` of `FullyShardedDataParallel` for a wrapped model.

    The transformer's blocks are units, and so is each thing that is trained.

        FullyShardedDataParallel(model, auto_wrap_policy=pyadapt.distributed.fsdp_auto_wrap_policy(model))
        accelerator.state.fsdp_plugin.auto_wrap_policy = pyadapt.distributed.fsdp_auto_wrap_policy(model)

    What is trained is left to the unit around it where other modules read it as well, and where it lies in a layer
    itself (biases); `use_orig_params=True` is needed then. A module whose inside is read from outside of it, as a
    prompt reads the table of embeddings, is no unit. In other models the blocks alone are units.

    Args:
        model: a wrapped model.
        classes: names of the classes of its blocks; by default those that `FSDP_TRANSFORMER_CLS_TO_WRAP` names
            (accelerate sets it from `fsdp_transformer_layer_cls_to_wrap`), else those that transformers says not to
            split.

    Raises:
        ValueError: the model has no module of a class that is named, or holds what FSDP1 cannot flatten.
    """
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    units, known = _own_units(model, classes), set(model.modules())
    _check_flat(model, units)
    names = set(_names_of_blocks(model, classes)[0])

    def is_unit(module: nn.Module) -> bool:
        return module in units or (module not in known and _name(module) in names)

    return functools.partial(lambda_auto_wrap_policy, lambda_fn=is_unit)


def check_fsdp1(model: nn.Module, settings: Fsdp1Settings) -> None:
    """Refuse settings under which FSDP1 cannot train a wrapped model, or would train another one.

    Where they can, but give frozen weights gradients, that is warned of.

    Raises:
        ValueError: a setting cannot work; the message has the line of accelerate's configuration that mends it.
    """
    units = _own_units(model) if settings.classes is None else _named_units(model, settings.classes)
    _check_flat(model, units)
    for module in units & _read_from_outside(model):
        raise ValueError(
            f"FSDP1: {_name(module)} holds embeddings that a prompt reads from outside of it, and cannot be a unit; "
            f"leave it out: {_line(model, without=_name(module))}"
        )
    for path, module, dtype in _disguised(model):
        if settings.param_dtype not in (None, dtype):
            raise ValueError(
                f"FSDP1: the int8 weight of {path} ({_name(module)}) is held as {dtype}, and a cast to "
                f"{settings.param_dtype} would destroy it: pyadapt.quantize(model, "
                f"storage_dtype={settings.param_dtype}), or MixedPrecision(param_dtype={dtype})"
            )
    mixed = [
        name
        for name, parameters in _flattened(model, units)
        if len({parameter.requires_grad for _, parameter in parameters}) > 1
    ]
    if not mixed:
        return
    if not settings.use_orig_params:
        raise ValueError(
            f"FSDP1 without use_orig_params cannot have trained and frozen parameters in one unit, as in "
            f"{mixed[0]}: set `fsdp_use_orig_params: true`"
            + ("" if settings.classes is None else f", or make what is trained units of its own: {_line(model)}")
        )
    if settings.classes is not None and not set(_unit_classes(model)) <= set(settings.classes):
        warnings.warn(
            f"FSDP1 gives frozen weights gradients where anything is trained in their unit, as in {mixed[0]}; let what "
            f"is trained be units of its own: {_line(model)}",
            stacklevel=2,
        )


def check_fsdp2(model: Any, classes: Iterable[str], upcast: bool = False) -> None:
    """Refuse classes of blocks with which FSDP2 cannot train a wrapped model.

    Args:
        model: a wrapped model.
        classes: as in `Fsdp1Settings`; accelerate takes those that transformers says not to split by default.
        upcast: whether what is trained is made fp32 first, as accelerate does with `mixed_precision`.

    Raises:
        ValueError: they cannot work; the message has the line of accelerate's configuration that mends it.
    """
    units, table = _named_units(model, classes), input_embedding(model)
    for module in units:
        if table is not None and table is not module and table in module.modules():
            raise ValueError(
                f"FSDP2: {_name(module)} holds the input embedding, of which accelerate makes a group of its own; "
                f"leave it out: {_line(model, without=_name(module))}"
            )
    for unit, parameters in _flattened(model, units):
        trained = {parameter.dtype: name for name, parameter in parameters if parameter.requires_grad}
        if len(trained) > 1 and not upcast:
            (one, first), (other, second) = list(trained.items())[:2]
            raise ValueError(
                f"FSDP2 cannot train {one} and {other} in one group, as {first} and {second} in {unit}: set "
                f'`mixed_precision: bf16`, give both one dtype (adapter_dtype="base"), or make what is trained groups '
                f"of its own: {_line(model)}"
            )


def _own_units(model: nn.Module, classes: Iterable[str] | None = None) -> set[nn.Module]:
    """The units of `fsdp_auto_wrap_policy`."""
    names, strict = _names_of_blocks(model, classes)
    blocks = _named_units(model, names, strict)
    copies = {module.copies[name] for _, module in saved_modules(model) for name in module.copies}
    adapters = {module for module in model.modules() if isinstance(module, AdapterUnit) and _has_parameters(module)}
    readers = _readers(model)
    trained = {
        module
        for module in copies | adapters
        if all(readers[id(p)] <= set(module.modules()) for p in module.parameters())
    }
    return (blocks - _read_from_outside(model) - copies - adapters) | trained


def _names_of_blocks(model: nn.Module, classes: Iterable[str] | None) -> tuple[list[str], bool]:
    """The names of the classes of blocks, and whether somebody has named them."""
    said = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if classes is None else classes
    named = [name.strip() for name in said if name.strip()]
    return named or list(getattr(model, "_no_split_modules", None) or ()), bool(named)


def _named_units(model: nn.Module, names: Iterable[str], strict: bool = True) -> set[nn.Module]:
    classes = {type(module).__name__ for module in model.modules()}
    missing = [name for name in names if name not in classes]
    if missing and strict:
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(missing)}, of which this {type(model).__name__} has "
            f"no module; of its own: {_line(model)}"
        )
    wanted = set(names)
    return {module for module in model.modules() if type(module).__name__ in wanted and module is not model}


def _readers(model: nn.Module) -> dict[int, set[nn.Module]]:
    """Identity of a parameter -> the modules that have it."""
    readers: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            readers.setdefault(id(parameter), set()).add(module)
    return readers


def _read_from_outside(model: nn.Module) -> set[nn.Module]:
    """Modules around a parameter that an adapter further out reads, without calling them."""
    found: set[nn.Module] = set()
    for _, layer in adapted_layers(model):
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        wanted = {id(parameter) for parameter in layer.base.stored(layer).values()} - own
        if wanted:
            found |= {
                module
                for module in layer.modules()
                if module is not layer
                and wanted & {id(p) for p in module.parameters()}
                and not wanted & {id(p) for p in module.parameters(recurse=False)}
            }
    return found


def _flattened(model: nn.Module, units: set[nn.Module]) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
    """(name, its parameters by name) of what each unit would flatten, the root last."""
    owned: dict[nn.Module, list[tuple[str, Tensor]]] = {}

    def visit(path: str, module: nn.Module, unit: nn.Module) -> None:
        unit = module if module in units else unit
        for name, parameter in module.named_parameters(recurse=False):
            owned.setdefault(unit, []).append((f"{path}{name}", parameter))
        for name, child in module.named_children():
            visit(f"{path}{name}.", child, unit)

    visit("", model, model)
    for unit, parameters in owned.items():
        yield _name(unit), parameters


def _check_flat(model: nn.Module, units: set[nn.Module]) -> None:
    """What holds for either value of `use_orig_params`."""
    places: dict[int, tuple[str, str]] = {}
    for number, (unit, parameters) in enumerate(_flattened(model, units)):
        for name, parameter in parameters:
            if not parameter.is_floating_point():
                raise ValueError(
                    f"FSDP1 cannot flatten {parameter.dtype}, as of {name}: hold int8 weights in the bytes of the "
                    f"model's own dtype, pyadapt.quantize(model, storage_dtype={_dtype(parameters)}), or use FSDP2 "
                    "(`fsdp_version: 2`)"
                )
            other, first = places.setdefault(id(parameter), (f"{unit} {number}", name))
            if other != f"{unit} {number}":
                raise ValueError(
                    f"FSDP1: {first} and {name} are one parameter in two units, which would be trained apart; leave a "
                    f"class out: {_line(model, without=unit)}"
                )
        name, first_of = parameters[0]
        for other_name, parameter in parameters:
            if parameter.dtype != first_of.dtype:
                raise ValueError(
                    f"FSDP1 cannot have {first_of.dtype} and {parameter.dtype} in one unit, as {name} and {other_name} "
                    f'in {unit}: give both one dtype (adapter_dtype="base"), or make what is trained units of its own, '
                    f"where no two modules read it: {_line(model)}"
                )


def _disguised(model: nn.Module) -> Iterator[tuple[str, nn.Module, torch.dtype]]:
    """(path, layer, dtype) of each layer whose integers are held in the bytes of a floating dtype."""
    for path, module in model.named_modules():
        base = base_of(module)
        if base is not None and base.quantized:
            held = next(iter(base.stored(module).values())).dtype
            if held.is_floating_point and not base.operand_dtype(module).is_floating_point:
                yield path, module, held


def _dtype(parameters: Iterable[tuple[str, Tensor]]) -> torch.dtype:
    """That of the first floating one, for an error's way out."""
    return next((p.dtype for _, p in parameters if p.is_floating_point() and not p.requires_grad), torch.float32)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _unit_classes(model: nn.Module) -> list[str]:
    every = (module for module in model.modules() if isinstance(module, AdapterUnit) and _has_parameters(module))
    return sorted({type(module).__name__ for module in every})


def _line(model: Any, without: str | None = None) -> str:
    """The line of accelerate's configuration that names blocks and what is trained."""
    blocks = set(getattr(model, "_no_split_modules", None) or ()) & {_name(module) for module in model.modules()}
    names = [name for name in [*sorted(blocks), *_unit_classes(model)] if name != without]
    return f"`fsdp_transformer_layer_cls_to_wrap: {','.join(names)}`"


def _name(module: nn.Module) -> str:
    return type(module).__name__
