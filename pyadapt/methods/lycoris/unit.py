"""What LoHa and LoKr have in common beside their configuration."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...base import BaseWeight
from ...method import AdapterUnit, LayerMethod
from .config import LycorisConfig
from .dropout import output_factors


class LycorisUnit(AdapterUnit):
    """Factors whose product, times a scaling, is added to W.

    Attributes:
        scaling: the factor s.
        rank_dropout: see `LycorisConfig`.
        module_dropout: see `LycorisConfig`.
    """

    # Whether rank dropout divides what is kept by its share.
    rescales: bool = False

    def __init__(
        self, config: LycorisConfig, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        self.scaling = config.scaling_of(path)
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout

    def output_factors(self, x: Tensor, features: int) -> Tensor | None:
        """What each output feature of the term is multiplied by in this step, (N,); None for ones."""
        if not self.training:
            return None
        return output_factors(x, features, self.rank_dropout, self.module_dropout, self.rescales)

    @abc.abstractmethod
    def scaled(self) -> nn.Parameter:
        """The parameter that takes another scaling of the update, in which the update is linear."""

    def can_take(self, values: Mapping[str, Tensor], config: LycorisConfig) -> bool:
        """See `AdapterUnit.can_take`; lower ranks are padded with zeros."""
        return self.can_take_padded(values)

    def take(self, values: Mapping[str, Tensor], config: LycorisConfig, path: str) -> None:
        """See `AdapterUnit.take`; the ratio of the scalings goes into `scaled`."""
        self.take_padded(values)
        self.scaled().mul_(config.scaling_of(path) / self.scaling)

    def extra_repr(self) -> str:
        """Scaling and dropouts, for `print(model)`."""
        return f"scaling={self.scaling:g}, rank_dropout={self.rank_dropout:g}, module_dropout={self.module_dropout:g}"


class LycorisMethod(LayerMethod):
    """LoHa or LoKr on linear layers and convolutions."""

    @classmethod
    def combination(cls, adapters: Sequence[str], weights: Sequence[float], **how: Any) -> Any:
        """See `LayerMethod.combination`: there is none."""
        name = cls.__name__
        raise ValueError(
            f"a weighted sum of {name} adapters is no {name}: let them work together, set_adapter([...]), each with "
            "its weight, set_scale(name, weight); or merge them"
        )
