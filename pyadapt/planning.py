"""What `wrap` would do: worked out and checked in full before anything is changed."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .base import Host, base_of
from .biases import is_bias_copy, own_bias, plan_biases
from .config import AdapterConfig
from .distributed import agreement
from .distributed.sharding import engine_of
from .layer import AdaptedLayer, SavedModule, base_modules
from .method import METHODS, AdapterUnit, LayerMethod, Preparation
from .placement import hooks_of, preloaded_block
from .surgery import check_adoptable
from .targets import adapted_places, paths_to_save, resolve
from .tasks import check_task
from .tokens import TokenUnit, check_apart, token_paths
from .tying import Targets, tie

# Columns of a plan's table.
COLUMNS = ("layer", "kind", "base", "shape", "rank", "parameters", "kernel")

# Tokens of the training step that a plan names the kernel for.
PLANNED_TOKENS = 512


@dataclass(frozen=True)
class LayerPlan:
    """One layer that would be adapted.

    Attributes:
        path: dotted path in the model.
        layer: class name of the layer.
        base: kind of its frozen weight, or of the module itself.
        out_features: N.
        in_features: K.
        rank: rank of the adapter there.
        shapes: the adapter's tensors, by key suffix in a PEFT file.
        kernel: the route that its kernels take for a training step of `PLANNED_TOKENS` tokens.
        unit_class: what is put on the layer.
        source: path of the layer whose parameters the adapter shares, as the weights of the two are tied.
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
    source: str | None = None

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
        biases: path -> number of values of each of the model's biases that is trained; 0 where it is an earlier one.
    """

    config: Any
    layers: list[LayerPlan]
    saved: dict[str, int]
    base_parameters: int
    biases: dict[str, int] = field(default_factory=dict)

    @property
    def method(self) -> type[LayerMethod]:
        """The method of the configuration."""
        return METHODS[self.config.peft_type]

    @property
    def trainable_parameters(self) -> int:
        """Number of values that training would change."""
        of_base = sum(self.saved.values()) + sum(self.biases.values())
        return sum(layer.parameters for layer in self.layers) + of_base

    @property
    def all_parameters(self) -> int:
        """The base, each value once, and the adapters; what is trained of the base is part of it."""
        return self.base_parameters + sum(layer.parameters for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, JSON-ready."""
        return {
            "config": self.config.to_dict(),
            "layers": [layer.as_dict() for layer in self.layers],
            "modules_to_save": dict(self.saved),
            "biases": dict(self.biases),
            "trainable_parameters": self.trainable_parameters,
            "all_parameters": self.all_parameters,
        }

    def summary(self) -> dict[str, Any]:
        """What ranks that plan the same adapter have in common, in short: what it is called -> its value."""
        shapes = {row.path: [row.unit_class.__qualname__, *map(str, row.shapes.items())] for row in self.layers}
        config = {f"{key} of the configuration": str(value) for key, value in self.config.to_dict().items()}
        return {
            **config,
            "the number of adapted layers": len(self.layers),
            "the number of trained values": self.trainable_parameters,
            "the layers and their shapes": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:12],
        }

    def as_table(self) -> list[dict[str, str]]:
        """A row a layer, then what is trained whole, each a dict from column to text; `pandas.DataFrame` takes it."""
        rows = [
            {
                "layer": layer.path,
                "kind": layer.layer,
                "base": layer.base,
                "shape": f"{layer.out_features} x {layer.in_features}",
                "rank": str(layer.rank),
                "parameters": f"{layer.parameters:,}",
                "kernel": layer.kernel,
            }
            for layer in self.layers
        ]
        beside = [(path, "trained whole", count) for path, count in self.saved.items()]
        if self.biases:
            beside.append((f"{len(self.biases)} biases", "trained", sum(self.biases.values())))
        blank = dict.fromkeys(COLUMNS, "")
        return rows + [{**blank, "layer": path, "kind": kind, "parameters": f"{n:,}"} for path, kind, n in beside]

    def __str__(self) -> str:
        """The table as text, then the totals."""
        rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *self.as_table()]
        widths = {column: max(len(row[column]) for row in rows) for column in COLUMNS}
        lines = ["  ".join(row[column].ljust(widths[column]) for column in COLUMNS).rstrip() for row in rows]
        share = 100 * self.trainable_parameters / self.all_parameters
        total = f"{self.trainable_parameters:,} of {self.all_parameters:,} parameters are trained ({share:.4f} %)"
        return "\n".join([*lines, total])


def make_plan(model: nn.Module, config: AdapterConfig, *, trained: bool = True) -> Plan:
    """Work out what `config` means for `model` and check it.

    Args:
        model: plain or wrapped.
        config: a configuration.
        trained: False for an adapter that comes from a file; see `tying.tie`.

    Raises:
        ValueError: the configuration does not fit the model.
        RuntimeError: the model is in a state that cannot be wrapped.
    """
    check_wrappable(model)
    check_task(config, model)
    method = METHODS[config.peft_type]
    resolved, paths = method.places(config, model) or resolve(config, model)
    saved = paths_to_save(resolved.modules_to_save or (), model)
    targets = Targets(resolved, paths, saved, token_paths(resolved, model))
    tie(targets, model, trained=trained)
    check_apart(list(targets.tokens), targets.adapted, targets.saved, model)
    method.check(targets.config, model, [path for path in targets.adapted if path not in targets.sources])
    counted: set[int] | None = set() if getattr(resolved, "ensure_weight_tying", False) else None
    return Plan(
        config=targets.config,
        layers=[_plan_layer(method, targets, path, model) for path in (*targets.adapted, *targets.tokens)],
        saved={path: _plan_saved(path, model.get_submodule(path), counted) for path in targets.saved},
        base_parameters=count_base_parameters(model),
        biases=_count_biases(model, plan_biases(targets.config, model, targets.adapted, targets.saved)),
    )


def prepare(model: nn.Module, config: AdapterConfig, data: Any = None) -> Preparation:
    """Plan a fresh adapter and work out what it starts from; nothing is changed.

    Ranks that a launcher started as one script have to come with the same plan.

    Raises:
        ValueError: the configuration does not fit the model or the data.
        RankError: ranks plan different adapters, or one of them failed.
        RuntimeError: the model is in a state that cannot be wrapped.
    """
    if agreement.is_one_script():
        with agreement.together("planning the adapter"):
            plan = make_plan(model, config)
        agreement.agree("planning the adapter", plan.summary())
    else:
        plan = make_plan(model, config)
    return plan.method.prepare(plan, model, data)


def check_wrappable(model: nn.Module) -> None:
    """Refuse what cannot be wrapped, with the way out."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise RuntimeError("this model is compiled already: wrap it first, then torch.compile it")
    block = preloaded_block(model)
    if block is not None:
        raise RuntimeError(
            f"accelerate brings all weights inside {block!r} at once, and would look for the adapters' among them: "
            "dispatch the model without preload_module_classes"
        )
    engine = engine_of(model)
    if engine is not None:
        raise RuntimeError(
            f"this model is sharded already: wrap it first, then shard it ({engine} has it in hand, and would not see "
            "what is added now)"
        )


def _check_not_on_disk(path: str, base: type[Host], layer: nn.Module) -> None:
    """Refuse a layer whose weight accelerate keeps on disk: it could be neither trained nor merged."""
    maps = (getattr(hook, "weights_map", None) for hook in hooks_of(layer))
    weights = next((map for map in maps if map is not None), None)
    loader = getattr(weights, "dataset", weights)
    on_disk = getattr(loader, "index", None) or {}
    if any(f"{getattr(weights, 'prefix', '')}{name}" in on_disk for name in base.stored(layer)):
        raise RuntimeError(
            f"the weight of {path} is offloaded to disk; load the model with a device_map that keeps the adapted "
            "layers in memory (more max_memory, or quantize it first)"
        )


def count_values(parameter: Tensor) -> int:
    """How many values `parameter` has, whatever tensor is in its place.

    ZeRO-3 leaves an empty one there and keeps the size beside it; bitsandbytes packs two values of 4 bits into a byte.
    """
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is not None:
        return quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def count_base_parameters(model: nn.Module) -> int:
    """Values of the base model, shared ones once; quantisation scales are not counted."""
    counted: dict[int, int] = {}
    for _, module in base_modules(model):
        base = base_of(module)
        # A kind's weight comes first; the rest is what it is read with.
        held = list(base.stored(module)) if base is not None and base.quantized else []
        scales = set(held[1:])
        for name, parameter in module.named_parameters(recurse=False):
            if name not in scales and not is_bias_copy(name):
                # The bytes of integers may be held in another dtype.
                counted[id(parameter)] = count_values(parameter)
                packed = name in held and parameter.is_floating_point()
                if base is not None and packed and base.operand_dtype(module) == torch.int8:
                    counted[id(parameter)] = math.prod(base.shape(module))
    return sum(counted.values())


def _count_biases(model: nn.Module, paths: list[str]) -> dict[str, int]:
    """Path -> values of the bias; 0 where it is that of an earlier path."""
    counted: dict[str, int] = {}
    seen: set[int] = set()
    for path in paths:
        bias = own_bias(model.get_submodule(path))
        counted[path] = 0 if id(bias) in seen else count_values(bias)
        seen.add(id(bias))
    return counted


def _plan_layer(method: type[LayerMethod], targets: Targets, path: str, model: nn.Module) -> LayerPlan:
    config, layer, by_rows = targets.config, model.get_submodule(path), path in targets.tokens
    source = targets.sources.get(path)
    # What a layer shares with another is described, and counted, there.
    first = path if source is None else source
    host: Any = base_of if by_rows else method.host
    base, first_base = host(layer), host(model.get_submodule(first))
    assert base is not None
    assert first_base is not None
    if not isinstance(layer, AdaptedLayer):
        check_adoptable(path, layer)
    _check_not_on_disk(path, base, layer)
    try:
        out_features, in_features = base.shape(layer)
        unit_class = TokenUnit if by_rows else method.unit_class(config, first_base)
        unit_class = unit_class if source is None else unit_class.follower(base.form)
        shapes = unit_class.shapes(config, first, base, layer)
    except ValueError as error:
        raise ValueError(f"{path} ({type(layer).__name__}): {error}") from None
    return LayerPlan(
        path=path,
        layer=type(layer).__name__,
        base=base.name,
        out_features=out_features,
        in_features=in_features,
        rank=0 if by_rows else max(method.rank(config, place) for place in adapted_places(config, first, layer)),
        shapes={unit_class.file_keys[attribute]: shape for attribute, shape in shapes.items() if source is None},
        kernel=unit_class.route(config, first, base, layer, PLANNED_TOKENS),
        unit_class=unit_class,
        source=source,
    )


def _plan_saved(path: str, module: nn.Module, counted: set[int] | None) -> int:
    """How many values of `module` are trained; parameters in `counted`, the tied ones of others, are not any more."""
    if not isinstance(module, SavedModule):
        check_adoptable(path, module)
    kinds = [base for inner in module.modules() if (base := base_of(inner)) is not None and base.quantized]
    if kinds:
        raise ValueError(
            f"modules_to_save: {path!r} is quantised ({kinds[0].name}) and cannot be trained; leave it dense: "
            f"quantize(model, skip=[..., {path!r}]), or llm_int8_skip_modules of BitsAndBytesConfig"
        )
    own = {id(p): p for name, p in module.named_parameters() if not name.startswith("copies.")}
    new = {key: p for key, p in own.items() if counted is None or key not in counted}
    if counted is not None:
        counted.update(own)
    return sum(map(count_values, new.values()))
