"""LoKr: an update that is the Kronecker product of two small matrices, each full or of low rank.

    dW = s kron(w1, w2),   w1 (a, c), w2 (b, d), a b = N, c d = K, s = alpha / r

`decompose_factor` says how N and K are cut (`factorization`). w2 is w2_a w2_b, (b, r) and (r, d), where r is below
half of max(b, d), and w1 is w1_a w1_b where `decompose_both` asks for it and r is below half of max(a, c). The w2 of a
convolution has the kernel behind d; with `use_effective_conv2d` a kernel of more than one place is taken apart:

    w2[q, k, ...] = sum_ij t2[i, j, ...] w2_a[i, q] w2_b[j, k],   t2 (r, r, *kernel), w2_a (r, b), w2_b (r, d)

dW is formed at a merge, and for convolutions with groups; how it runs else: `ops/lokr.py`.

Source: Yeh et al., "Navigating Text-to-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...base import BaseWeight
from ...config import AdapterConfig
from ...lookup import parameter
from ...method import AdapterUnit, register
from .config import LycorisConfig
from .unit import LycorisMethod, LycorisUnit

LYCORIS = "lycoris"


@dataclass
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr; names and defaults are those of PEFT. What is not listed: see `LycorisConfig`.

    Attributes:
        decompose_both: give w1 a low rank too, where that is less.
        decompose_factor: the size wanted of w1 along each side; -1 cuts N and K as near to a square as they allow.
        rank_dropout_scale: divide what rank dropout keeps by the share that was kept in this step.
        use_effective_conv2d: of `Conv1d` and `Conv2d`; other layers have the usual form.
        init_weights: True starts from w1 = 0, "lycoris" from w2 = 0 (its second factor where it has two); False starts
            from an update that is not zero.
    """

    peft_type: ClassVar[str] = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.decompose_factor
        if not isinstance(factor, int) or isinstance(factor, bool) or factor == 0 or factor < -1:
            raise ValueError(f"decompose_factor={factor!r}: a whole number of at least 1 is needed, or -1 for a square")
        if not isinstance(self.init_weights, bool) and self.init_weights != LYCORIS:
            raise ValueError(f'init_weights={self.init_weights!r}: LoKr knows True, False and "{LYCORIS}"')


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, as PEFT cuts a dimension.

    Args:
        size: what is cut.
        factor: the first number where it divides `size`; else no more than a bound of the first, which is the largest
            that gives a whole second number not smaller than itself. -1: no bound.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    root = math.isqrt(size)
    first = next(n for n in range(root if factor == -1 else min(factor, root), 0, -1) if size % n == 0)
    return first, size // first


class Factors(NamedTuple):
    """kron(w1, w2) with w2 = up down, or down where `up` is None.

    Attributes:
        w1: (a, c).
        down: (h, d, *kernel).
        up: (b, h).
    """

    w1: Tensor
    down: Tensor
    up: Tensor | None


class Sizes(NamedTuple):
    """How a layer's weight is cut: (a b, c d), with r's place in it."""

    a: int
    b: int
    c: int
    d: int
    is_w1_full: bool
    is_w2_full: bool


def sizes(config: LoKrConfig, path: str, out_features: int, in_features: int) -> Sizes:
    """The sizes for a layer of so many features (of one group, without the kernel)."""
    r = config.rank_of(path)
    a, b = factorization(out_features, config.decompose_factor)
    c, d = factorization(in_features, config.decompose_factor)
    return Sizes(a, b, c, d, not (config.decompose_both and r < max(a, c) / 2), r >= max(b, d) / 2)


class LoKrUnit(LycorisUnit):
    """The two factors of a LoKr, each whole or as two."""

    file_keys: ClassVar[dict[str, str]] = {
        name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    }

    # What the layer's shapes do not have is no attribute.
    lokr_w1: nn.Parameter
    lokr_w1_a: nn.Parameter
    lokr_w1_b: nn.Parameter
    lokr_w2: nn.Parameter
    lokr_w2_a: nn.Parameter
    lokr_w2_b: nn.Parameter

    def __init__(
        self, config: LoKrConfig, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        self.rescales = config.rank_dropout_scale
        shapes = self.shapes(config, path, base, layer)
        self.is_w1_full, self.is_w2_full = "lokr_w1" in shapes, "lokr_w2" in shapes

    @classmethod
    def shapes_of(cls, cut: Sizes, r: int, kernel: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by attribute, in the order in which PEFT draws their first values."""
        shapes: dict[str, tuple[int, ...]] = {}
        if cut.is_w1_full:
            shapes["lokr_w1"] = (cut.a, cut.c)
        else:
            shapes.update(lokr_w1_a=(cut.a, r), lokr_w1_b=(r, cut.c))
        if cut.is_w2_full:
            shapes["lokr_w2"] = (cut.b, cut.d, *kernel)
        else:
            shapes.update(lokr_w2_a=(cut.b, r), lokr_w2_b=(r, cut.d * math.prod(kernel)))
        return shapes

    def initialize(self, config: LoKrConfig, path: str, base: type[BaseWeight], layer: Any) -> None:
        """See `AdapterUnit.initialize`; the random numbers are drawn in PEFT's order."""
        zeros = {True: ("lokr_w1", "lokr_w1_a"), False: (), LYCORIS: ("lokr_w2", "lokr_w2_b")}[config.init_weights]
        for name, held in self.named_parameters(recurse=False):
            if name in zeros:
                nn.init.zeros_(held)
            else:
                nn.init.kaiming_uniform_(held, a=math.sqrt(5))

    def scaled(self) -> nn.Parameter:
        """See `LycorisUnit.scaled`."""
        return self.lokr_w1 if self.is_w1_full else self.lokr_w1_a

    def factors(self) -> Factors:
        """What the update is made of now."""
        w1 = parameter(self, "lokr_w1") if self.is_w1_full else None
        if w1 is None:
            with torch.autocast(self.lokr_w1_a.device.type, enabled=False):
                w1 = self.lokr_w1_a @ self.lokr_w1_b
        return Factors(w1, *self.right())

    def right(self) -> tuple[Tensor, Tensor | None]:
        """(down, up) of `Factors`."""
        if self.is_w2_full:
            return parameter(self, "lokr_w2"), None
        return parameter(self, "lokr_w2_b"), parameter(self, "lokr_w2_a")

    def delta(self) -> Tensor:
        """dW as `BaseWeight.matrix` is shaped, in fp32, or fp64 for an fp64 adapter."""
        with torch.no_grad():
            w1, down, up = self.factors()
            wide = torch.promote_types(w1.dtype, torch.float32)
            w2 = down.flatten(1).to(wide) if up is None else up.to(wide) @ down.flatten(1).to(wide)
            return torch.kron(self.scaling * w1.to(wide), w2)

    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`."""
        matrix += self.delta()
        return matrix, bias


@register
class LoKr(LycorisMethod):
    """LoKr; `lokr_linear` and `lokr_conv` add their units."""

    peft_type: ClassVar[str] = LoKrConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = LoKrConfig
    units: ClassVar[dict[str, type[AdapterUnit]]] = {}
