"""What `wrap` would do: worked out and checked in full before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .base import base_of
from .config import AdapterConfig
from .layer import AdaptedLayer, SavedModule, base_modules
from .method import METHODS, AdapterUnit, LayerMethod
from .surgery import check_adoptable
from .targets import paths_to_save, resolve

# Tokens of the training step that a plan names the kernel for.
PLANNED_TOKENS = 512


@dataclass(frozen=True)
class LayerPlan:
    """One layer that would be adapted.

    Attributes:
        path: dotted path in the model.
        layer: class name of the layer.
        base: kind of its frozen weight.
        out_features: N.
        in_features: K.
        rank: rank of the adapter there.
        shapes: the adapter's tensors, by key suffix in a PEFT file.
        kernel: the route that its kernels take for a training step of `PLANNED_TOKENS` tokens.
        unit_class: what is put on the layer.
    """

    path: str
    layer: str
    base: str
    out_features: int
    in_features: int
    rank: int
    shapes: dict[str, tuple[int, ...]]
    kernel: str
    unit_class: type[AdapterUnit]

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, JSON-ready."""
        row = {key: value for key, value in vars(self).items() if key != "unit_class"}
        shapes = {key: list(shape) for key, shape in self.shapes.items()}
        return {**row, "shapes": shapes, "parameters": self.parameters}


@dataclass(frozen=True)
class Plan:
    """What a configuration means for a model; `str(plan)` is a table.

    Attributes:
        config: the configuration with everything said outright that was left to the library.
        layers: the layers that get an adapter.
        saved: path -> number of parameters of each module that is trained whole.
        base_parameters: number of values in the base model, each counted once.
    """

    config: Any
    layers: list[LayerPlan]
    saved: dict[str, int]
    base_parameters: int

    @property
    def method(self) -> type[LayerMethod]:
        """The method of the configuration."""
        return METHODS[self.config.peft_type]

    @property
    def trainable_parameters(self) -> int:
        """Number of values that training would change."""
        return sum(layer.parameters for layer in self.layers) + sum(self.saved.values())

    @property
    def all_parameters(self) -> int:
        """The base, each value once, and the adapters; a module that is trained whole is part of the base."""
        return self.base_parameters + sum(layer.parameters for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, JSON-ready."""
        return {
            "config": self.config.to_dict(),
            "layers": [layer.as_dict() for layer in self.layers],
            "modules_to_save": dict(self.saved),
            "trainable_parameters": self.trainable_parameters,
            "all_parameters": self.all_parameters,
        }

    def __str__(self) -> str:
        """A row a layer, then the totals."""
        head = ("layer", "kind", "base", "shape", "rank", "parameters", "kernel")
        rows = [
            (
                layer.path,
                layer.layer,
                layer.base,
                f"{layer.out_features} x {layer.in_features}",
                str(layer.rank),
                f"{layer.parameters:,}",
                layer.kernel,
            )
            for layer in self.layers
        ]
        rows += [(path, "trained whole", "", "", "", f"{count:,}", "") for path, count in self.saved.items()]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]
        ]
        share = 100 * self.trainable_parameters / self.all_parameters
        total = f"{self.trainable_parameters:,} of {self.all_parameters:,} parameters are trained ({share:.4f} %)"
        return "\n".join([*lines, total])


def make_plan(model: nn.Module, config: AdapterConfig) -> Plan:
    """Work out what `config` means for `model` and check it.

    Raises:
        ValueError: the configuration does not fit the model.
        RuntimeError: the model is in a state that cannot be wrapped.
    """
    check_wrappable(model)
    resolved, paths = resolve(config, model)
    method = METHODS[config.peft_type]
    method.check(resolved, model, paths)
    return Plan(
        config=resolved,
        layers=[_plan_layer(method, resolved, path, model.get_submodule(path)) for path in paths],
        saved={
            path: _plan_saved(path, model.get_submodule(path))
            for path in paths_to_save(resolved.modules_to_save or (), model)
        },
        base_parameters=count_base_parameters(model),
    )


def check_wrappable(model: nn.Module) -> None:
    """Refuse what cannot be wrapped, with the way out."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise RuntimeError("this model is compiled already: wrap it first, then torch.compile it")
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise RuntimeError("this model is sharded already: wrap it first, then shard it")


def _check_not_on_disk(path: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight accelerate keeps on disk: it could be neither trained nor merged."""
    weights = getattr(getattr(layer, "_hf_hook", None), "weights_map", None)
    loader = getattr(weights, "dataset", weights)
    if f"{getattr(weights, 'prefix', '')}weight" in (getattr(loader, "index", None) or {}):
        raise RuntimeError(
            f"the weight of {path} is offloaded to disk; load the model with a device_map that keeps the adapted "
            "layers in memory (more max_memory, or quantize it first)"
        )


def count_values(parameter: nn.Parameter) -> int:
    """How many values `parameter` has; ZeRO-3 leaves an empty tensor in place and keeps the true size beside it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def count_base_parameters(model: nn.Module) -> int:
    """Values of the base model, shared ones once; quantisation scales are not counted."""
    counted: dict[int, int] = {}
    for _, module in base_modules(model):
        base = base_of(module)
        # A kind's weight comes first; the rest is what it is read with.
        scales = set(list(base.stored(module))[1:]) if base is not None and base.quantized else set()
        for name, parameter in module.named_parameters(recurse=False):
            if name not in scales:
                counted[id(parameter)] = count_values(parameter)
    return sum(counted.values())


def _plan_layer(method: type[LayerMethod], config: Any, path: str, layer: nn.Module) -> LayerPlan:
    base = base_of(layer)
    assert base is not None
    if not isinstance(layer, AdaptedLayer):
        check_adoptable(path, layer)
    _check_not_on_disk(path, layer)
    out_features, in_features = base.shape(layer)
    try:
        unit_class = method.unit_class(config, base)
        shapes = unit_class.shapes(config, path, base, layer)
    except ValueError as error:
        raise ValueError(f"{path} ({type(layer).__name__}): {error}") from None
    return LayerPlan(
        path=path,
        layer=type(layer).__name__,
        base=base.name,
        out_features=out_features,
        in_features=in_features,
        rank=method.rank(config, path),
        shapes={unit_class.file_keys[attribute]: shape for attribute, shape in shapes.items()},
        kernel=unit_class.route(config, path, base, layer, PLANNED_TOKENS),
        unit_class=unit_class,
    )


def _plan_saved(path: str, module: nn.Module) -> int:
    if not isinstance(module, SavedModule):
        check_adoptable(path, module)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.is_floating_point()]
    if frozen:
        raise ValueError(
            f"modules_to_save: {path!r} is quantised ({frozen[0]}) and cannot be trained; "
            f"leave it out with quantize(model, skip=[..., {path!r}])"
        )
    return sum(count_values(p) for name, p in module.named_parameters() if not name.startswith("copies."))
