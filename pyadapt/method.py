"""What a method is to the rest of pyadapt: how a layer's adapter is described, made, run and written."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import le
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .base import BaseWeight, Host, base_of
from .config import AdapterConfig
from .layer_config import RankedConfig
from .low_rank import LowRank, linear_by_row
from .ops import routes

if TYPE_CHECKING:
    from .distributed.sharding import Sharding
    from .layer import AdaptedLayer
    from .planning import Plan
    from .rows import Rows

# peft_type -> method. A file in `methods/` adds itself with `@register`.
METHODS: dict[str, type[LayerMethod]] = {}

# What folds an adapter into a layer's weight and bias as other adapters have left them: see `AdapterUnit.fold`.
Fold = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]

# What a plan says of a layer whose adapter runs on torch's own operators.
TORCH_ROUTE = "torch"


@dataclass(frozen=True)
class Preparation:
    """What a fresh adapter starts from beside its layers' own weights, worked out before anything is changed.

    Attributes:
        plan: what is put on the model; its configuration may have become another (ranks by EVA).
        values: path of a layer -> attribute of its unit -> first value, where `AdapterUnit.initialize` cannot know it.
        finish: called last.
    """

    plan: Plan
    values: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    finish: Callable[[], object] = field(default=lambda: None)


class AdapterUnit(nn.Module, abc.ABC):
    """The weights of one adapter on one layer: a leaf module with its own parameters.

    A layer never reads these parameters; it calls the unit and passes itself. So each engine that gathers
    parameters around a module's forward (ZeRO-3, FSDP) finds both the layer's and the unit's at hand.

    Args:
        config: the method's configuration.
        path: dotted path of the layer in the model.
        base: the kind of its frozen weight.
        layer: the layer; its weight is read where the initialisation depends on it.
        device: where the layer computes.
        dtype: of the new weights.
    """

    # Attribute of the unit -> what follows the layer's path in a PEFT file.
    file_keys: ClassVar[dict[str, str]] = {}
    # What older files write in place of such a key -> the key.
    file_aliases: ClassVar[dict[str, str]] = {}
    # Whether the layer's rows are those of the batch, so that each can have an adapter of its own; else why not.
    by_row: ClassVar[bool] = True
    why_not_by_row: ClassVar[str] = "mixes the batch's rows"
    # Whether `fold` can put the adapter into the layer's weight; else it stays beside the model.
    folds: ClassVar[bool] = True
    # How many positions the unit puts before each sequence that the model decodes.
    prepended: int = 0
    # Values of the arguments in `LayerMethod.call_arguments`, set for the length of a call of the model.
    call_arguments: Mapping[str, Any] = MappingProxyType({})
    # Whether that call may have made several rows of each of the batch's since, as a beam search does.
    call_repeats: bool = False
    # Whether the adapter started as the answer to what quantising took from W, so that it belongs to the quantised W.
    fits_quantization: bool = False
    # Path of the layer whose unit owns the parameters of this one, where the weights of the two layers are tied.
    source: str | None = None
    # Whether a PEFT file holds the parameters once more for a layer that follows another; it may where this is False.
    writes_mirror: ClassVar[bool] = True

    # Units are compiled with their layer, never by themselves: what looks whether they were is left out of the call.
    __call__ = nn.Module._call_impl

    def __init__(
        self, config: Any, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        for attribute, shape in self.shapes(config, path, base, layer).items():
            setattr(self, attribute, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    @classmethod
    @abc.abstractmethod
    def shapes(cls, config: Any, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the unit's parameters on this layer, by attribute."""

    @classmethod
    def follower(cls, form: str) -> type[AdapterUnit]:
        """The unit for a layer of `form` whose weight is tied to that of a layer with a unit of this class."""
        return cls

    def follow(self, unit: AdapterUnit, source: str) -> None:
        """Share the parameters and buffers of `unit`, which is on the layer at `source`."""
        self.source = source
        for name, parameter in unit.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in unit.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=False)

    @classmethod
    def mirrored(cls, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a layer that follows another, as a PEFT file holds them.

        Args:
            values: tensors of the unit that is followed, by what comes after its layer's path in the file.
        """
        return dict(values)

    @classmethod
    def route(cls, config: Any, path: str, base: type[BaseWeight], layer: Any, tokens: int) -> str:
        """The route that the kernels take for a training step of `tokens` tokens."""
        return TORCH_ROUTE

    @classmethod
    def needs_start(cls, config: Any) -> bool:
        """Whether `initialize` has to run even where every parameter is then read from a file."""
        return False

    @abc.abstractmethod
    def initialize(self, config: Any, path: str, base: type[BaseWeight], layer: Any) -> None:
        """Give the parameters their first values."""

    def start_training(self, config: Any) -> None:
        """Register, as persistent buffers, what training keeps beside the parameters; they are in place by now."""

    def training_state(self) -> dict[str, Tensor]:
        """What training needs besides the parameters to go on from here, by attribute; empty where that is nothing."""
        return {}

    def join(self, units: Sequence[AdapterUnit]) -> None:
        """Get to know the units of the adapter, this one among them, in the order of the plan; all are made by now."""

    def start_from(self, values: Mapping[str, Tensor], layer: Any) -> None:
        """Take first values that `initialize` could not know, by attribute; called without gradients."""
        for attribute, value in values.items():
            getattr(self, attribute).copy_(value)

    def settle(self) -> None:
        """Change the layer's own weight where starting asks for it, once the units of all layers are made."""

    @abc.abstractmethod
    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """The layer's output with this adapter in it.

        Args:
            x: the layer's input, (..., K).
            owner: the adapted layer; `owner.operands()` gives its frozen weight, `owner.frozen(x)` its own output.
            y: None when this adapter comes first and computes the frozen product as well, in one kernel; else the
                output so far, (..., N), to which the adapter's term is added.
        """

    @staticmethod
    def run(units: Sequence[nn.Module], owner: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with all of `units` at work; the class of the first unit decides how they join."""
        y: Tensor | None = None
        for unit in units:
            # The unit gets the layer, not its weight: a tensor that crosses a module boundary is kept alive
            # in full by ZeRO-3's hooks.
            y = unit(*args, owner, y, **kwargs)
        return y

    @staticmethod
    def run_by_row(rows: Rows, owner: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with each row of `x` answered by a unit of its own, or by the layer itself."""

        def answer(i: int, part: Tensor) -> Tensor:
            if i < 0:
                return owner.frozen(part, *args, **kwargs)
            return rows.units[i].run((rows.units[i],), owner, part, *args, **kwargs)

        every = [unit.low_rank() for unit in rows.units] if owner.base.form == "linear" else []
        terms = [term for term in every if term is not None]
        if not terms or len(terms) < len(rows.units):
            return rows.split(answer, x)
        return linear_by_row(rows, terms, owner, x)

    def low_rank(self) -> LowRank | None:
        """The low-rank term that this adapter is on a linear layer just now, if it is no more than that."""
        return None

    @classmethod
    def check_together(cls, units: Mapping[str, AdapterUnit]) -> None:
        """Refuse adapters of which no sum, or none of this class with the others, is defined on one layer.

        Args:
            units: adapter name -> its unit on the layer; one of them is of this class.

        Raises:
            ValueError: they cannot be at work together.
        """

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As that of any module; the name is kept, for an engine may put other tensors in a parameter's place."""
        super().register_parameter(name, param)
        self.__dict__.setdefault("weight_names", {})[name] = None

    def weights(self) -> dict[str, Tensor]:
        """What the parameters are at the moment, by attribute; FSDP1 has plain tensors there in forward."""
        found = {name: getattr(self, name, None) for name in self.__dict__.get("weight_names", ())}
        return {name: weight for name, weight in found.items() if weight is not None}

    def by_file_key(self) -> dict[str, nn.Parameter]:
        """The parameters by what follows the layer's path in a PEFT file."""
        return {self.file_keys[name]: parameter for name, parameter in self.named_parameters(recurse=False)}

    def can_take(self, values: Mapping[str, Tensor], config: Any) -> bool:
        """Whether `take` can put another adapter's values into these parameters as they are.

        Args:
            values: by what follows the layer's path in a PEFT file.
            config: that adapter's configuration.
        """
        own = {key: parameter.shape for key, parameter in self.by_file_key().items()}
        return own == {key: value.shape for key, value in values.items()}

    def can_pad(self, value: Tensor, held: nn.Parameter) -> bool:
        """Whether `value` is the parameter `held` at ranks that are not higher."""
        return value.dim() == held.dim() and all(map(le, value.shape, held.shape))

    def can_take_padded(self, values: Mapping[str, Tensor]) -> bool:
        """Whether `take_padded` can put another adapter's values into these parameters."""
        own = self.by_file_key()
        return own.keys() == values.keys() and all(self.can_pad(values[key], held) for key, held in own.items())

    def take_padded(self, values: Mapping[str, Tensor]) -> None:
        """Take over another adapter's values, of these ranks or lower ones, with zeros beyond."""
        for key, held in self.by_file_key().items():
            held.zero_()
            held[tuple(slice(0, size) for size in values[key].shape)] = values[key].to(held.dtype)

    def take(self, values: Mapping[str, Tensor], config: Any, path: str) -> None:
        """Take over another adapter's values for the layer at `path`, in place."""
        for key, parameter in self.by_file_key().items():
            parameter.copy_(values[key])

    def folding(self, matrix: Tensor, bias: Tensor | None) -> Fold:
        """What folds this adapter in after others; `matrix` and `bias` are the layer's own, before any is."""
        return self.fold

    @abc.abstractmethod
    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The merged weight and bias; not called where `folds` is False.

        Args:
            matrix: the frozen weight as `BaseWeight.matrix` gives it; it may be changed in place.
            bias: the layer's bias in the dtype of `matrix`, or None.
        """


class UnitBeside(AdapterUnit):
    """A unit that is no change of a weight and serves the whole batch: it is neither merged nor chosen by row."""

    by_row: ClassVar[bool] = False
    why_not_by_row: ClassVar[str] = "has one prompt for the whole batch"
    folds: ClassVar[bool] = False

    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`."""
        raise RuntimeError(f"a {type(self).__name__} is no change of a weight")


def product_route(base: type[BaseWeight], layer: Any, tokens: int, rank: int = 0) -> str:
    """The route of a linear layer's product, with a low-rank term of rank `rank`, for a step of `tokens` tokens."""
    device = next(iter(base.stored(layer).values())).device.type
    dtypes = base.dtype(layer), base.operand_dtype(layer)
    return routes.predict("forward", device, *dtypes, tokens, *base.shape(layer), rank).route


# Given as data: it comes later, by `initialize_lora_eva_weights`.
DATA_FOLLOWS: Any = object()


def refuse_data(data: Any) -> None:
    """Refuse data that no initialisation of the configuration looks at."""
    if data is not None and data is not DATA_FOLLOWS:
        raise ValueError('data is given, but only LoRA with init_lora_weights="eva" starts from data')


class LayerMethod:
    """A method that gives each targeted layer an `AdapterUnit`."""

    peft_type: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]
    # Form of a layer -> the unit that serves it.
    units: ClassVar[dict[str, type[AdapterUnit]]] = {}
    # Whether training follows a schedule, so that `after_step` is to be called after each optimizer step.
    has_schedule: ClassVar[bool] = False
    # Whether an adapter in training adds a term to the loss; see `penalty`.
    has_penalty: ClassVar[bool] = False
    # Whether the tensors of a file have other keys than a unit's path and attribute, so that values in memory are to be
    # read and given as those of files are; see `read` and `as_saved`.
    has_own_keys: ClassVar[bool] = False
    # Whether units put positions before the text (see `AdapterUnit.prepended`).
    prepends: ClassVar[bool] = False
    # Further arguments of a call of the model, which the units are given (see `AdapterUnit.call_arguments`).
    call_arguments: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def places(config: Any, model: nn.Module) -> tuple[Any, list[str]] | None:
        """Where the adapter goes, for a method that does not adapt the layers its configuration names.

        Returns:
            As `targets.resolve`; None leaves it to that.

        Raises:
            ValueError: the model has no place for the adapter.
        """
        return None

    @classmethod
    def host(cls, layer: nn.Module) -> type[Host] | None:
        """What kind of module `layer` is to this method, or None if it can carry none of its units."""
        return base_of(layer)

    @classmethod
    def unit_class(cls, config: Any, base: type[BaseWeight]) -> type[AdapterUnit]:
        """The unit for a layer with this kind of weight.

        Raises:
            ValueError: the method has none for what such a layer computes.
        """
        if base.form not in cls.units:
            raise ValueError(f"{cls.__name__} cannot adapt {base.form} layers, only {' and '.join(cls.units)} ones")
        return cls.units[base.form]

    @staticmethod
    def rank(config: Any, path: str) -> int:
        """The rank of the adapter on the layer at `path`; 0 where there is none."""
        return config.rank_of(path) if isinstance(config, RankedConfig) else 0

    @staticmethod
    def check(config: Any, model: nn.Module, paths: list[str]) -> None:
        """Refuse, before anything is changed, what fits the configuration but not these layers of this model."""
        if isinstance(config, RankedConfig):
            config.check_patterns(paths)

    @staticmethod
    def after_step(
        name: str, config: Any, units: Sequence[Any], global_step: int, sharding: Sharding | None = None
    ) -> None:
        """Do what training asks for after an optimizer step.

        Args:
            name: of the adapter, for messages.
            config: its configuration.
            units: its units on all layers.
            global_step: how many steps were taken, this one included.
            sharding: how the units' parameters are sharded, or None where this rank has them all.

        Raises:
            ValueError: the method has no schedule.
        """
        raise ValueError(f"adapter {name!r} follows no schedule")

    @staticmethod
    def before_call(config: Any, units: Sequence[Any], sharded: bool) -> None:
        """Get ready for a call of the model after which `penalty` is asked for.

        Args:
            config: the adapter's configuration.
            units: its units on all layers.
            sharded: whether an engine has sharded their parameters, which are then whole in their own forward alone.
        """

    @staticmethod
    def penalty(config: Any, units: Sequence[Any]) -> Tensor | None:
        """The scalar that the adapter with `units` adds to the loss; None where it is none."""
        return None

    @staticmethod
    def prepare(plan: Plan, model: nn.Module, data: Any) -> Preparation:
        """Work out what a fresh adapter starts from where that takes more than one layer at a time.

        Args:
            plan: what would be put on the model.
            model: the model, wrapped or not.
            data: what the user gave for an initialisation that looks at data.

        Raises:
            ValueError: data is missing, or given where nothing looks at it.
        """
        refuse_data(data)
        return Preparation(plan)

    @classmethod
    def read(
        cls, model: nn.Module, config: Any, tensors: dict[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """The configuration and tensors of a file as they are written today, for `model`.

        Args:
            model: what the file is read for.
            config: the file's configuration.
            tensors: the file's tensors by key.
            prefix: what stands before a layer's path in the keys.

        Raises:
            ValueError: the file means something that this method does not have.
        """
        return config, tensors

    @classmethod
    def as_saved(
        cls, model: nn.Module, name: str, config: Any, tensors: dict[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """The configuration and tensors of the adapter called `name` as its file is to hold them.

        Args:
            model: a wrapped model.
            name: the adapter.
            config: its configuration.
            tensors: its live tensors by key.
            prefix: what stands before a layer's path in the keys.
        """
        return config, tensors

    @classmethod
    def as_plain_lora(
        cls, model: nn.Module, name: str, config: Any, tensors: Mapping[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """The configuration and the file's tensors of an adapter as those of a plain LoRA on the original weights.

        Raises:
            ValueError: the adapter cannot be one.
        """
        raise ValueError(f"adapter {name!r} is of type {cls.peft_type}; only LoRA can be saved as plain LoRA")

    # A method for whose adapters a weighted sum is defined says so in these three.

    @classmethod
    def combination(cls, adapters: Sequence[str], weights: Sequence[float], **how: Any) -> Any:
        """A checked description of a weighted combination.

        Raises:
            ValueError: the arguments do not fit each other, or the method defines no combination.
        """
        raise ValueError(f"{cls.peft_type} adapters cannot be combined by weight")

    @classmethod
    def combined_config(cls, combination: Any, configs: Sequence[Any], model: nn.Module, paths: Sequence[str]) -> Any:
        """The configuration of the combined adapter, for the layers at `paths`."""
        raise ValueError(f"{cls.peft_type} adapters cannot be combined by weight")

    @classmethod
    def combine(
        cls, combination: Any, units: Sequence[Any], weights: Sequence[float], new: Any, layer: nn.Module
    ) -> None:
        """Give the unit `new` on `layer` the combined weights of `units`, each with its weight."""
        raise ValueError(f"{cls.peft_type} adapters cannot be combined by weight")


def register(method: type[LayerMethod]) -> type[LayerMethod]:
    """Class decorator: make a method known by its `peft_type`."""
    METHODS[method.peft_type] = method
    return method
