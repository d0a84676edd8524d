"""(IA)^3: infused adapters by inhibiting and amplifying inner activations, one file for each form of layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...config import AdapterConfig
from ...discovery import import_submodules
from ...method import AdapterUnit, LayerMethod, register
from ...targets import matches
from .config import IA3Config, peft_matches
from .conv import ConvUnit
from .defaults import as_expression
from .unit import IA3Unit, LinearUnit
from .weighting import Combination, combine, combined_config

import_submodules(__name__, __path__)

__all__ = ["IA3", "IA3Config", "IA3Unit"]

logger = logging.getLogger("pyadapt")


@register
class IA3(LayerMethod):
    """IA3 on linear layers and convolutions."""

    peft_type: ClassVar[str] = IA3Config.peft_type
    config_class: ClassVar[type[AdapterConfig]] = IA3Config
    units: ClassVar[dict[str, type[AdapterUnit]]] = {"linear": LinearUnit, "conv": ConvUnit}

    @staticmethod
    def check(config: IA3Config, model: nn.Module, paths: list[str]) -> None:
        """See `LayerMethod.check`."""
        wanted = config.feedforward_modules
        if wanted and not any(config.is_feedforward(path) for path in paths):
            logger.warning("feedforward_modules=%r matches none of the %d adapted layers", wanted, len(paths))

    @classmethod
    def read(
        cls, model: nn.Module, config: IA3Config, tensors: dict[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """See `LayerMethod.read`.

        A list of feed-forward modules that PEFT matches otherwise, without a dot boundary, was PEFT's to match when the
        factors were made: the files written here have an expression then.
        """
        names = config.feedforward_modules
        if isinstance(names, list):
            paths = [key.removeprefix(prefix).removesuffix(".ia3_l") for key in tensors if key.endswith(".ia3_l")]
            inputs = [path for path in paths if peft_matches(names, path)]
            if inputs != [path for path in paths if matches(names, path)]:
                config = config.replaced(feedforward_modules=as_expression(inputs))
        return config, tensors

    @classmethod
    def combination(cls, adapters: Sequence[str], weights: Sequence[float], **how: Any) -> Combination:
        """See `LayerMethod.combination`; there is one kind."""
        if how:
            raise ValueError(f"{', '.join(map(repr, how))}: IA3 adapters are combined in one way, without options")
        return Combination(adapters, weights)

    combined_config = staticmethod(combined_config)

    @classmethod
    def combine(
        cls, combination: Combination, units: Sequence[Any], weights: Sequence[float], new: Any, layer: nn.Module
    ) -> None:
        """See `LayerMethod.combine`."""
        combine(combination, units, weights, new)
