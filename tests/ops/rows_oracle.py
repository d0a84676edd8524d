"""The mathematics of a batch whose segments of rows have adapters of their own in fp64, and batches to try it on.

As in ``oracle.py``, for the rows of each adapter: S = (x D) A', y = x W' + bias + s S B', and their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.oracle import make_layer
from pyadapt.ops import lora_rows  # noqa: F401  (registers the ops)
from pyadapt.ops.philox import keep_mask

F32, F64 = torch.float32, torch.float64
RANKS = (3, 16, 1, 8)

# (rows of each segment, its adapter); ragged on purpose.
PATTERNS = {
    "one row": [(1, 2)],
    "one adapter for all": [(37, 1)],
    "a row each": [(1, 0), (1, 1), (1, 2), (1, 3)],
    "few and many rows": [(5, 0), (4, 1), (1, 2), (70, 3)],
    "base rows between": [(3, -1), (2, 1), (6, -1), (9, 0), (1, -1)],
    "only base rows": [(7, -1)],
    "empty segments": [(0, 0), (4, 1), (0, 2), (0, -1), (9, 3), (0, 1)],
    "an adapter in several segments": [(2, 1), (3, 0), (40, 1), (1, 2), (1, 1)],
    "neighbours of one adapter": [(3, 1), (4, 1), (2, -1), (2, -1), (5, 1)],
    "no rows": [],
}


def segments_of(pattern: list[tuple[int, int]]) -> Tensor:
    """The table of a pattern: first row and adapter."""
    starts = [sum(rows for rows, _ in pattern[:j]) for j in range(len(pattern))]
    return torch.tensor([[start, a] for start, (_, a) in zip(starts, pattern, strict=True)]).reshape(-1, 2).long()


@dataclass(frozen=True)
class Batch:
    """One layer's operands, as the ops take them."""

    x: Tensor
    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    As: list[Tensor]
    Bs: list[Tensor]
    g: Tensor
    segments: Tensor
    scalings: list[float]
    dropouts: list[float]
    seed: Tensor | None = None

    def forward(self, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(y, S) of the op under test."""
        return torch.ops.pyadapt.lora_rows_forward(*self.forward_arguments(out_dtype or self.x.dtype))

    def backward(self, S: Tensor, need_dx: bool = True) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(dx, dA, dB) of the op under test."""
        return torch.ops.pyadapt.lora_rows_backward(*self.backward_arguments(S, need_dx))

    def forward_arguments(self, out_dtype: torch.dtype) -> tuple[object, ...]:
        """In the order of the schema."""
        layer = (self.x, self.weight, self.weight_scale, self.bias, self.As, self.Bs)
        return (*layer, self.scalings, self.dropouts, self.segments, self.seed, out_dtype)

    def backward_arguments(self, S: Tensor, need_dx: bool) -> tuple[object, ...]:
        """In the order of the schema."""
        layer = (self.g, self.x, self.weight, self.weight_scale, self.As, self.Bs)
        return (*layer, self.scalings, self.dropouts, self.segments, S, self.seed, need_dx)

    def exact_weight(self) -> Tensor:
        """W in fp64."""
        W = self.weight.double()
        return W if self.weight_scale is None else W * self.weight_scale.double()[:, None]

    def rows_of(self, adapter: int) -> Tensor:
        """The rows that an adapter serves, as a boolean (M,)."""
        served = torch.zeros(self.x.shape[0], dtype=torch.bool)
        for start, a in self.segments.tolist():  # a later segment takes over the rows from its own first one on
            served[start:] = a == adapter
        return served

    def exact_mask(self, adapter: int) -> Tensor:
        """drop() as a factor (M, K) in fp64."""
        p = self.dropouts[adapter]
        if p == 0.0 or self.x.numel() == 0:
            return torch.ones(self.x.shape, dtype=F64)
        return keep_mask(self.seed, p, *self.x.shape).double() / (1.0 - p if p < 1.0 else 1.0)

    def exact_forward(self) -> tuple[Tensor, Tensor]:
        """(y, S) in fp64."""
        x = self.x.double()
        y = x @ self.exact_weight().t()
        S = x.new_zeros((x.shape[0], max(A.shape[0] for A in self.As)))
        for a, (A, B) in enumerate(zip(self.As, self.Bs, strict=True)):
            served = self.rows_of(a)[:, None].double()
            low = served * ((x * self.exact_mask(a)) @ A.double().t())
            S[:, : A.shape[0]] += low
            y = y + self.scalings[a] * (low @ B.double().t())
        return (y if self.bias is None else y + self.bias.double()), S

    def exact_backward(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(dx, dA, dB) in fp64."""
        x, g = self.x.double(), self.g.double()
        dx, dAs, dBs = g @ self.exact_weight(), [], []
        for a, (A, B) in enumerate(zip(self.As, self.Bs, strict=True)):
            served, D = self.rows_of(a)[:, None].double(), self.exact_mask(a)
            dropped = served * x * D
            dS = served * self.scalings[a] * (g @ B.double())
            dx = dx + (dS @ A.double()) * D
            dAs.append(dS.t() @ dropped)
            dBs.append(self.scalings[a] * g.t() @ (dropped @ A.double().t()))
        return dx, dAs, dBs


def make_batch(
    pattern: list[tuple[int, int]],
    K: int = 75,
    N: int = 53,
    dtype: torch.dtype = F32,
    weight_dtype: torch.dtype | None = None,
    adapter_dtypes: tuple[torch.dtype, ...] = (F32,),
    dropouts: tuple[float, ...] = (0.0,),
    ranks: tuple[int, ...] = RANKS,
) -> Batch:
    """Random operands; adapter a has the dtype and the dropout at a modulo their number."""
    layer = make_layer(sum(rows for rows, _ in pattern), K, N, 1, dtype, weight_dtype)
    dtypes = [adapter_dtypes[a % len(adapter_dtypes)] for a in range(len(ranks))]
    return Batch(
        x=layer.x,
        weight=layer.weight,
        weight_scale=layer.weight_scale,
        bias=layer.bias,
        As=[torch.randn(r, K).to(dtype) for r, dtype in zip(ranks, dtypes, strict=True)],
        Bs=[torch.randn(N, r).to(dtype) for r, dtype in zip(ranks, dtypes, strict=True)],
        g=layer.g,
        segments=segments_of(pattern),
        scalings=[0.5 + a for a in range(len(ranks))],
        dropouts=[dropouts[a % len(dropouts)] for a in range(len(ranks))],
        seed=torch.tensor([20240229]),
    )
