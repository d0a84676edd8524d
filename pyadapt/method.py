"""What a method is to the rest of pyadapt: how a layer's adapter is described, made, run and written."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .config import AdapterConfig

if TYPE_CHECKING:
    from .base import BaseWeight

# peft_type -> method. A file in `methods/` adds itself with `@register`.
METHODS: dict[str, type[LayerMethod]] = {}


class AdapterUnit(nn.Module, abc.ABC):
    """The weights of one adapter on one layer: a leaf module with its own parameters.

    A layer never reads these parameters; it calls the unit and passes itself. So each engine that gathers
    parameters around a module's forward (ZeRO-3, FSDP) finds both the layer's and the unit's at hand.
    """

    # Attribute of the unit -> what follows the layer's path in a PEFT file.
    file_keys: ClassVar[dict[str, str]] = {}

    @abc.abstractmethod
    def forward(self, x: Tensor, owner: nn.Module, y: Tensor | None = None) -> Tensor:
        """The layer's output with this adapter in it.

        Args:
            x: the layer's input, (..., K).
            owner: the adapted layer; `owner.operands()` gives its frozen weight.
            y: None when this adapter comes first and computes the frozen product as well, in one kernel; else the
                output so far, (..., N), to which the adapter's term is added.
        """

    @abc.abstractmethod
    def delta(self) -> Tensor:
        """What the adapter adds to the weight: (N, K), fp32 (fp64 for an fp64 adapter)."""


class LayerMethod(abc.ABC):
    """A method that gives each targeted layer an `AdapterUnit`."""

    peft_type: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]

    @staticmethod
    @abc.abstractmethod
    def shapes(config: Any, path: str, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the unit's tensors, by key suffix in a PEFT file, for the layer at `path`."""

    @staticmethod
    @abc.abstractmethod
    def rank(config: Any, path: str) -> int:
        """The rank that decides the kernel's route for the layer at `path`; 0 where there is none."""

    @staticmethod
    @abc.abstractmethod
    def make_unit(
        config: Any,
        path: str,
        base: type[BaseWeight],
        layer: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ) -> AdapterUnit:
        """A freshly initialised unit for the layer at `path`."""

    @staticmethod
    @abc.abstractmethod
    def check(config: Any, model: nn.Module, paths: list[str]) -> None:
        """Refuse, before anything is changed, what fits the configuration but not these layers of this model."""


def register(method: type[LayerMethod]) -> type[LayerMethod]:
    """Class decorator: make a method known by its `peft_type`."""
    METHODS[method.peft_type] = method
    return method
