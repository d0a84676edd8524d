"""LoHa on a convolution: one to r^2 channels and one of kernel 1 where that pays, else one with dW.

The Khatri-Rao identity (`ops/loha.py`) is one of the flattened W. Taken apart, it holds with t x_2 w_b in w_b's place:

    P[i] = sum_j t[i, j] w_b[j]   (r, in / groups * prod(kernel)),   dW = s (w1_a' P1) * (w2_a' P2)

Stride, padding, dilation, padding mode and groups are the layer's (PEFT loses the padding mode).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import low_rank
from ...base import BaseWeight
from ...layer import AdaptedLayer
from ...ops.loha import KhatriRao, low_rank_dtype
from .loha import LoHa, LoHaConfig, LoHaUnit

KHATRI_RAO_CONV, REFERENCE_CONV = "khatri-rao, convolutions", "convolution with dW"


def is_low_rank(out_features: int, in_features: int, rank: int, groups: int) -> bool:
    """Whether a convolution to r^2 channels and one of kernel 1 cost less than one with dW (N, K)."""
    return groups == 1 and rank**2 * (out_features + in_features) <= out_features * in_features


def is_effective(config: LoHaConfig, layer: Any) -> bool:
    """Whether the kernel's places are taken apart; PEFT never does so where there is one place."""
    kernel = layer.kernel_size
    return config.use_effective_conv2d and len(kernel) < 3 and any(size != 1 for size in kernel)


class ConvUnit(LoHaUnit):
    """LoHa on y = W * x + b in one, two or three dimensions."""

    hada_t1: nn.Parameter
    hada_t2: nn.Parameter

    @classmethod
    def shapes(cls, config: LoHaConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        if not is_effective(config, layer):
            return super().shapes(config, path, base, layer)
        r, out, channels = config.rank_of(path), layer.out_channels, layer.in_channels // layer.groups
        kernel = layer.kernel_size if len(layer.kernel_size) == 2 else (*layer.kernel_size, 1)
        return {
            "hada_w1_a": (r, out),
            "hada_w1_b": (r, channels),
            "hada_w2_a": (r, out),
            "hada_w2_b": (r, channels),
            "hada_t1": (r, r, *kernel),
            "hada_t2": (r, r, *kernel),
        }

    @classmethod
    def route(cls, config: LoHaConfig, path: str, base: type[BaseWeight], layer: Any, tokens: int) -> str:
        """See `AdapterUnit.route`."""
        pays = is_low_rank(*base.shape(layer), config.rank_of(path), layer.groups)
        return KHATRI_RAO_CONV if pays else REFERENCE_CONV

    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `LoHaUnit.matrices`."""
        if "hada_t1" not in self._parameters:
            return super().matrices()
        with torch.autocast(self.hada_t1.device.type, enabled=False):
            P1 = torch.einsum("ijkl,jc->ickl", self.hada_t1, self.hada_w1_b).flatten(1)
            P2 = torch.einsum("ijkl,jc->ickl", self.hada_t2, self.hada_w2_b).flatten(1)
        return self.hada_w1_a.t(), P1, self.hada_w2_a.t(), P2

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`; x (batch, in, *size), or without the batch."""
        y = owner.frozen(x) if y is None else y
        return y + self.term(x, owner).to(y.dtype)

    def term(self, x: Tensor, owner: Any) -> Tensor:
        """What the adapter adds to the layer's output."""
        w1a, w1b, w2a, w2b = self.matrices()
        factors, dtype = self.output_factors(x, w1a.shape[0]), low_rank_dtype(x)
        w1a = self.scaling * (w1a if factors is None else w1a * factors.to(w1a.dtype)[:, None])
        if is_low_rank(w1a.shape[0], w1b.shape[1], w1b.shape[0], owner.groups):
            A, B = KhatriRao.apply(w1a, w1b, w2a, w2b, None, 1.0, dtype)
            A = A.view(-1, owner.in_channels, *owner.kernel_size)
            return low_rank.conv(x, A, B.view(*B.shape, *(1 for _ in owner.kernel_size)), owner)
        if torch.is_grad_enabled():
            # dW and a cast x are made again in backward, not kept.
            four = w1a, w1b, w2a, w2b
            return checkpoint(with_delta, x, *four, owner, dtype, use_reentrant=False, preserve_rng_state=False)
        return with_delta(x, w1a, w1b, w2a, w2b, owner, dtype)


def with_delta(x: Tensor, w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, owner: Any, dtype: torch.dtype) -> Tensor:
    """The convolution of x with dW, in `dtype`."""
    with torch.autocast(x.device.type, enabled=False):
        delta = ((w1a @ w1b) * (w2a @ w2b)).to(dtype)
    kernel = (owner.out_channels, owner.in_channels // owner.groups, *owner.kernel_size)
    return low_rank.conv_like(x.to(dtype), delta.view(kernel), owner, owner.groups)


LoHa.units["conv"] = ConvUnit
