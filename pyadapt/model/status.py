"""Reports of the state that a model's adapters are in, with the fields of PEFT's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..base import base_of
from ..layer import AdaptedLayer, LiveDict, SavedModule
from ..surgery import original_class

if TYPE_CHECKING:
    from .reports import Reports

# What a field holds whose value is not the same everywhere.
IRREGULAR: Literal["irregular"] = "irregular"


@dataclass(frozen=True)
class LayerStatus:
    """The state of one layer, or of one module that is trained whole.

    Attributes:
        name: its path.
        module_type: what is on it and what it is: `LinearUnit on Linear`.
        enabled: whether adapters are.
        active_adapters: names of the adapters that are at work in it.
        merged_adapters: names of those that are folded into its weight.
        requires_grad: adapter -> whether its parameters there are trained, or "irregular"; without those that have none
            there, as what moves positions on has none.
        available_adapters: names of all that it has, sorted.
        devices: adapter -> device types of its parameters there.
        quantization_backend: kind of the frozen weight where it is quantised, else None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass(frozen=True)
class ModelStatus:
    """The state of the whole model; a field that differs between layers is "irregular".

    Attributes:
        base_model_type: class of the user's model.
        peft_types: adapter -> its method.
        trainable_params: number of trained values.
        total_params: number of all values.
        num_adapter_layers: how many layers and modules carry adapters.
        enabled, active_adapters, merged_adapters, requires_grad, devices, quantization_backend: as in `LayerStatus`.
        available_adapters: names of all adapters, sorted.
    """

    base_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Literal["irregular"] | None


def layer_status(model: Reports) -> list[LayerStatus]:
    """The state of each layer of `model` that carries an adapter, in the model's order."""
    state = model.adapter_state
    rows = []
    for path, module, entries in _carriers(model):
        base = base_of(module)
        rows.append(
            LayerStatus(
                name=path,
                module_type=f"{_kinds(entries)} on {original_class(module).__name__}",
                enabled=state.enabled,
                active_adapters=[name for name in state.active if name in entries],
                merged_adapters=[name for name in state.merged if name in entries],
                requires_grad={
                    name: _same([parameter.requires_grad for parameter in parameters])
                    for name, unit in entries.items()
                    if (parameters := list(unit.parameters()))
                },
                available_adapters=sorted(entries),
                devices={name: sorted({p.device.type for p in unit.parameters()}) for name, unit in entries.items()},
                quantization_backend=base.name if base is not None and base.quantized else None,
            )
        )
    return rows


def model_status(model: Reports) -> ModelStatus:
    """The state of the whole of `model`."""
    layers = layer_status(model)
    trained, total = model.get_nb_trainable_parameters()
    names = list(model.peft_config)
    return ModelStatus(
        base_model_type=original_class(model).__name__,
        peft_types={name: config.peft_type for name, config in model.peft_config.items()},
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=model.adapter_state.enabled,
        active_adapters=list(model.adapter_state.active),
        merged_adapters=list(model.adapter_state.merged),
        requires_grad={
            name: _same([row.requires_grad[name] for row in layers if name in row.requires_grad]) for name in names
        },
        available_adapters=sorted(names),
        devices={name: sorted({device for row in layers for device in row.devices.get(name, ())}) for name in names},
        quantization_backend=_same([row.quantization_backend for row in layers]),
    )


def _carriers(model: nn.Module) -> Iterable[tuple[str, nn.Module, LiveDict]]:
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module, module.adapters
        elif isinstance(module, SavedModule):
            yield path, module, module.copies


def _kinds(entries: LiveDict) -> str:
    return ", ".join(dict.fromkeys(type(unit).__name__ for unit in entries.values()))


def _same(values: Sequence[Any]) -> Any:
    first = values[0] if values else False
    return first if all(value == first for value in values) else IRREGULAR
