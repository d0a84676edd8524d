"""What the units of LoHa and LoKr have in common."""

from __future__ import annotations

from collections.abc import Mapping
from operator import le
from typing import Any

import torch
from torch import Tensor, nn

from ...base import BaseWeight
from ...method import AdapterUnit
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

    def scaled(self) -> nn.Parameter:
        """The parameter that takes another scaling of the update, in which the update is linear."""
        raise NotImplementedError

    def can_take(self, values: Mapping[str, Tensor], config: LycorisConfig) -> bool:
        """See `AdapterUnit.can_take`; lower ranks are padded with zeros."""
        own = self.by_file_key()
        return own.keys() == values.keys() and all(
            values[key].dim() == held.dim() and all(map(le, values[key].shape, held.shape)) for key, held in own.items()
        )

    def take(self, values: Mapping[str, Tensor], config: LycorisConfig, path: str) -> None:
        """See `AdapterUnit.take`; the ratio of the scalings goes into `scaled`."""
        for key, held in self.by_file_key().items():
            value = values[key]
            held.zero_()
            held[tuple(slice(0, size) for size in value.shape)] = value.to(held.dtype)
        self.scaled().mul_(config.scaling_of(path) / self.scaling)

    def extra_repr(self) -> str:
        """Scaling and dropouts, for `print(model)`."""
        return f"scaling={self.scaling:g}, rank_dropout={self.rank_dropout:g}, module_dropout={self.module_dropout:g}"
