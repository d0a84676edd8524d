"""LoHa: an update that is the Hadamard product of two products of low rank.

    dW = s (w1_a w1_b) * (w2_a w2_b),   w*_a (N, r), w*_b (r, K), s = alpha / r

so that its rank may be r^2. A convolution's W is seen as (out, in / groups * prod(kernel)); with
`use_effective_conv2d` a kernel of more than one place is taken apart:

    dW = s (t1 x_1 w1_a x_2 w1_b) * (t2 x_1 w2_a x_2 w2_b),   t* (r, r, *kernel), w*_a (r, out), w*_b (r, in / groups)

dW is formed at a merge, and for convolutions where no other form pays; how it runs else: `ops/loha.py`.

Source: Hyeon-Woo et al., "FedPara: Low-rank Hadamard Product for Communication-Efficient Federated Learning", 2022;
LyCORIS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base import BaseWeight
from ...config import AdapterConfig
from ...method import AdapterUnit, register
from .config import LycorisConfig
from .unit import LycorisMethod, LycorisUnit


@dataclass
class LoHaConfig(LycorisConfig):
    """Configuration of LoHa; names and defaults are those of PEFT. What is not listed: see `LycorisConfig`.

    Attributes:
        rank_dropout: as there; what is kept is divided by the share that was kept in this step.
        use_effective_conv2d: of `Conv1d` and `Conv2d`; other layers have the usual form.
        init_weights: False starts from an update that is not zero.
    """

    peft_type: ClassVar[str] = "LOHA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights={self.init_weights!r}: LoHa knows True, which starts from 0, and False")


class LoHaUnit(LycorisUnit):
    """The four factors of a LoHa, and two more where a convolution is taken apart."""

    file_keys: ClassVar[dict[str, str]] = {
        name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    }
    rescales = True

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    @classmethod
    def shapes(cls, config: LoHaConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        r, (N, K) = config.rank_of(path), base.shape(layer)
        return {"hada_w1_a": (N, r), "hada_w1_b": (r, K), "hada_w2_a": (N, r), "hada_w2_b": (r, K)}

    def initialize(self, config: LoHaConfig, path: str, base: type[BaseWeight], layer: Any) -> None:
        """See `AdapterUnit.initialize`; the random numbers are drawn in PEFT's order."""
        for name, parameter in self.named_parameters(recurse=False):
            if name == "hada_w2_b" and config.init_weights:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w1_a (N, r), w1_b (r, K), w2_a, w2_b for which s (w1_a w1_b) * (w2_a w2_b) is added to W (N, K)."""
        return self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b

    def delta(self) -> Tensor:
        """dW (N, K) in fp32, or fp64 for an fp64 adapter."""
        with torch.no_grad():
            w1a, w1b, w2a, w2b = (
                matrix.to(torch.promote_types(matrix.dtype, torch.float32)) for matrix in self.matrices()
            )
            return (w1a @ w1b).mul_(w2a @ w2b).mul_(self.scaling)

    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`."""
        matrix += self.delta()
        return matrix, bias

    def scaled(self) -> nn.Parameter:
        """See `LycorisUnit.scaled`."""
        return self.hada_w2_b


@register
class LoHa(LycorisMethod):
    """LoHa; `loha_linear` and `loha_conv` add their units."""

    peft_type: ClassVar[str] = LoHaConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = LoHaConfig
    units: ClassVar[dict[str, type[AdapterUnit]]] = {}
