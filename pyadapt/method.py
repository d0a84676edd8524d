"""What a method is to the rest of pyadapt: how a layer's adapter is described, made, run and written."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .config import AdapterConfig

if TYPE_CHECKING:
    from .base import BaseWeight
    from .layer import AdaptedLayer

# peft_type -> method. A file in `methods/` adds itself with `@register`.
METHODS: dict[str, type[LayerMethod]] = {}

# What a plan says of a layer whose adapter runs on torch's own operators.
TORCH_ROUTE = "torch"


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
    def route(cls, config: Any, path: str, base: type[BaseWeight], layer: Any, tokens: int) -> str:
        """The route that the kernels take for a training step of `tokens` tokens."""
        return TORCH_ROUTE

    @abc.abstractmethod
    def initialize(self, config: Any, path: str, base: type[BaseWeight], layer: Any) -> None:
        """Give the parameters their first values."""

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

    @abc.abstractmethod
    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The merged weight and bias.

        Args:
            matrix: the frozen weight as `BaseWeight.matrix` gives it; it may be changed in place.
            bias: the layer's bias in the dtype of `matrix`, or None.
        """


class LayerMethod(abc.ABC):
    """A method that gives each targeted layer an `AdapterUnit`."""

    peft_type: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]

    @staticmethod
    @abc.abstractmethod
    def unit_class(config: Any, base: type[BaseWeight]) -> type[AdapterUnit]:
        """The unit for a layer with this kind of weight.

        Raises:
            ValueError: the method has none for what such a layer computes.
        """

    @staticmethod
    @abc.abstractmethod
    def rank(config: Any, path: str) -> int:
        """The rank of the adapter on the layer at `path`; 0 where there is none."""

    @staticmethod
    @abc.abstractmethod
    def check(config: Any, model: nn.Module, paths: list[str]) -> None:
        """Refuse, before anything is changed, what fits the configuration but not these layers of this model."""


def register(method: type[LayerMethod]) -> type[LayerMethod]:
    """Class decorator: make a method known by its `peft_type`."""
    METHODS[method.peft_type] = method
    return method
