"""LoRA on a frozen linear layer where each segment of rows has an adapter of its own.

Rows [start_j, start_{j+1}) use adapter a = a_j, or the frozen layer alone where a_j is -1. For a row of adapter a

    S = drop(x) A_a'          y = x W' scale + bias + s_a S B_a'

and with dS = dL/dS, sums going over all rows of the adapter,

    dS = s_a g B_a            dx = g W + mask(dS A_a)
    dB_a = s_a g' S           dA_a = dS' drop(x)

Shapes: x (M, K), W (N, K), A_a (r_a, K), B_a (N, r_a), g (M, N), segments (n, 2): first row and adapter. S is (M, R),
R the largest rank; a row holds its adapter's r_a columns and zeros beyond. Ranks, scalings and dropout probabilities
may differ; the mask is that of ``ops/lora.py``, by seed, row of x and column. An adapter without a row gets zero
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyadapt import native

from . import registry
from .linear import (
    FrozenOwner,
    compute_dtype,
    frozen_dx,
    frozen_forward,
    like_rows,
    linear_dx_reference,
    linear_forward_reference,
)
from .philox import dropout
from .routes import native_serves

Part = tuple[slice, int]


def read_segments(segments: Tensor, M: int, adapters: int) -> list[Part]:
    """(rows, adapter) of each segment that has rows and an adapter.

    Args:
        segments: (n, 2) int64: first row, ascending from 0, and adapter; -1 is the frozen layer alone.
        M: rows in all; the last segment ends there.
        adapters: how many there are.

    Raises:
        ValueError: a segment that does not fit, by its index.
        TypeError: segments is not int64.
    """
    if segments.dim() != 2 or segments.shape[1] != 2:
        raise ValueError(f"segments has shape {tuple(segments.shape)}; wanted (n, 2): first row and adapter")
    if segments.dtype != torch.int64:
        raise TypeError(f"segments is {segments.dtype}; wanted torch.int64")
    table = segments.tolist()
    if not table and M > 0:
        raise ValueError(f"segments is empty, but x has {M} rows; wanted one from row 0 on")
    parts = []
    for j, (row, adapter) in enumerate(table):
        end = table[j + 1][0] if j + 1 < len(table) else M
        if j == 0 and row != 0:
            raise ValueError(f"segments starts at row {row}; wanted 0")
        if row > M:
            raise ValueError(f"segments[{j}] starts at row {row}, but x has {M}")
        if end < row:
            raise ValueError(
                f"segments[{j + 1}] starts at row {end}, before segments[{j}] at {row}; wanted ascending rows"
            )
        if not -1 <= adapter < adapters:
            raise ValueError(
                f"segments[{j}] asks for adapter {adapter} of {adapters}; wanted -1 for none, or an index below that"
            )
        if adapter >= 0 and end > row:
            parts.append((slice(row, end), adapter))
    return parts


def _check_adapters(
    As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float], dropouts: Sequence[float], N: int, K: int
) -> None:
    for name, given in (("B", Bs), ("scalings", scalings), ("dropouts", dropouts)):
        if len(given) != len(As):
            raise ValueError(f"{name} has {len(given)} entries; wanted one for each of the {len(As)} adapters in A")
    for a, (A, B) in enumerate(zip(As, Bs, strict=True)):
        if A.dim() != 2 or A.shape[1] != K:
            raise ValueError(f"A[{a}] has shape {tuple(A.shape)}; wanted (r, K) with K = {K}")
        if B.shape != (N, A.shape[0]):
            raise ValueError(f"B[{a}] has shape {tuple(B.shape)}; wanted (N, r) = {(N, A.shape[0])}")


def _largest_rank(As: Sequence[Tensor]) -> int:
    return max((A.shape[0] for A in As), default=0)


def _empty_like(matrix: Tensor) -> Tensor:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)


# --- plain torch ---


def _dropped(x: Tensor, seed: Tensor | None, dropouts: Sequence[float], parts: list[Part]) -> dict[float, Tensor]:
    """drop(x), for each probability in use."""
    return {p: dropout(x, seed, p) for p in {dropouts[a] for _, a in parts}}


def _to_dtypes_of(matrices: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    return [value.to(matrix.dtype) for matrix, value in zip(matrices, values, strict=True)]


def _low_rank(
    x: Tensor,
    N: int,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropouts: Sequence[float],
    segments: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(s S B', S) by segments."""
    _check_adapters(As, Bs, scalings, dropouts, N, x.shape[1])
    parts = read_segments(segments, x.shape[0], len(As))
    x = x.to(compute_dtype(x))
    dropped = _dropped(x, seed, dropouts, parts)
    S = x.new_zeros((x.shape[0], _largest_rank(As)))
    delta = x.new_zeros((x.shape[0], N))
    for rows, a in parts:
        r = As[a].shape[0]
        S[rows, :r] = dropped[dropouts[a]][rows] @ As[a].to(x.dtype).t()
        delta[rows] = scalings[a] * (S[rows, :r] @ Bs[a].to(x.dtype).t())
    return delta, S


def _low_rank_backward(
    g: Tensor,
    x: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropouts: Sequence[float],
    segments: Tensor,
    S: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(mask(dS A), dA, dB) by segments."""
    _check_adapters(As, Bs, scalings, dropouts, g.shape[1], x.shape[1])
    parts = read_segments(segments, x.shape[0], len(As))
    dtype = compute_dtype(x)
    g, x, S = g.to(dtype), x.to(dtype), S.to(dtype)
    dropped = _dropped(x, seed, dropouts, parts)
    low = torch.zeros_like(x)
    dAs, dBs = [torch.zeros_like(A, dtype=dtype) for A in As], [torch.zeros_like(B, dtype=dtype) for B in Bs]
    for rows, a in parts:
        dS = scalings[a] * (g[rows] @ Bs[a].to(dtype))
        dAs[a] += dS.t() @ dropped[dropouts[a]][rows]
        dBs[a] += scalings[a] * (g[rows].t() @ S[rows, : As[a].shape[0]])
        low[rows] = dS @ As[a].to(dtype)
    masked = _dropped(low, seed, dropouts, parts)
    for rows, a in parts:
        low[rows] = masked[dropouts[a]][rows]
    return low, _to_dtypes_of(As, dAs), _to_dtypes_of(Bs, dBs)


def lora_rows_forward_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropouts: Sequence[float],
    segments: Tensor,
    seed: Tensor | None,
    out_dtype: torch.dtype,
    frozen: Callable[..., Tensor] = linear_forward_reference,
) -> tuple[Tensor, Tensor]:
    """(y, S) in plain torch, the frozen product by ``frozen``."""
    with torch.autocast(x.device.type, enabled=False):
        delta, S = _low_rank(x, weight.shape[0], As, Bs, scalings, dropouts, segments, seed)
        return (frozen(x, weight, weight_scale, bias, S.dtype) + delta).to(out_dtype), S


def lora_rows_backward_reference(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropouts: Sequence[float],
    segments: Tensor,
    S: Tensor,
    seed: Tensor | None,
    need_dx: bool,
    frozen: Callable[..., Tensor] = linear_dx_reference,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dx, dA, dB) in plain torch, g W by ``frozen``; dx is empty when it is not asked for."""
    with torch.autocast(x.device.type, enabled=False):
        low, dAs, dBs = _low_rank_backward(g, x, As, Bs, scalings, dropouts, segments, S, seed)
        if not need_dx:
            return x.new_empty(0), dAs, dBs
        return (frozen(g, weight, weight_scale, low.dtype) + low).to(x.dtype), dAs, dBs


# --- ops: the frozen product by whichever route serves it, the low-rank passes native or plain ---


def _native_serves(x: Tensor, *dtypes: torch.dtype) -> bool:
    """There is a kernel for the CPU alone."""
    return native.device_kind(x) == "cpu" and native_serves(x, *dtypes)


def _dtypes(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> set[torch.dtype]:
    return {matrix.dtype for matrices in (As, Bs) for matrix in matrices}


def _lora_rows_forward(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    As: list[Tensor],
    Bs: list[Tensor],
    scalings: list[float],
    dropouts: list[float],
    segments: Tensor,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not _native_serves(x, x.dtype, out_dtype, *_dtypes(As, Bs)):
        return lora_rows_forward_reference(
            x, weight, weight_scale, bias, As, Bs, scalings, dropouts, segments, seed, out_dtype, frozen_forward
        )
    y = frozen_forward(x, weight, weight_scale, bias, out_dtype)
    S = x.new_empty((x.shape[0], _largest_rank(As)), dtype=torch.float32)
    threads = torch.get_num_threads()
    native.core().lora_rows_forward(x, As, Bs, segments, S, y, scalings, dropouts, seed, threads)  # type: ignore[union-attr]
    return y, S


def _lora_rows_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    As: list[Tensor],
    Bs: list[Tensor],
    scalings: list[float],
    dropouts: list[float],
    segments: Tensor,
    S: Tensor,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    if not _native_serves(x, x.dtype, g.dtype, *_dtypes(As, Bs)):
        return lora_rows_backward_reference(
            g, x, weight, weight_scale, As, Bs, scalings, dropouts, segments, S, seed, need_dx, frozen_dx
        )
    dx = frozen_dx(g, weight, weight_scale, x.dtype) if need_dx else x.new_empty(0)
    dAs, dBs = [_empty_like(A) for A in As], [_empty_like(B) for B in Bs]
    native.core().lora_rows_backward(  # type: ignore[union-attr]
        g,
        x,
        As,
        Bs,
        segments,
        S,
        dx if need_dx else None,
        dAs,
        dBs,
        scalings,
        dropouts,
        seed,
        torch.get_num_threads(),
    )
    return dx, dAs, dBs


def _lora_rows_forward_fake(
    x: Tensor, weight: Tensor, weight_scale: Any, bias: Any, As: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=rest[-1])
    return y, x.new_empty((x.shape[0], _largest_rank(As)), dtype=compute_dtype(x))


def _lora_rows_backward_fake(
    g: Tensor, x: Tensor, weight: Tensor, weight_scale: Any, As: list[Tensor], Bs: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx = x.new_empty(x.shape if rest[-1] else (0,))
    return dx, [_empty_like(A) for A in As], [_empty_like(B) for B in Bs]


registry.define(
    "lora_rows_forward(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor[] A, Tensor[] B, "
    "float[] scalings, float[] dropouts, Tensor segments, Tensor? seed, ScalarType out_dtype) -> (Tensor y, Tensor S)",
    _lora_rows_forward,
    fake=_lora_rows_forward_fake,
)
registry.define(
    "lora_rows_backward(Tensor g, Tensor x, Tensor weight, Tensor? weight_scale, Tensor[] A, Tensor[] B, "
    "float[] scalings, float[] dropouts, Tensor segments, Tensor S, Tensor? seed, bool need_dx) "
    "-> (Tensor dx, Tensor[] dA, Tensor[] dB)",
    _lora_rows_backward,
    fake=_lora_rows_backward_fake,
)


class LoraRows(registry.Function):
    """A frozen linear layer with an adapter for each segment of rows, over any leading dimensions of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        owner: FrozenOwner,
        segments: Tensor,
        scalings: list[float],
        dropouts: list[float],
        seed: Tensor | None,
        out_dtype: torch.dtype,
        *matrices: Tensor,
    ) -> Tensor:
        """y (..., N) for x (..., K). ``owner.operands()`` is read here and again in backward, never kept.

        ``segments`` is (n, 2) int64 on the CPU and counts the rows of x.view(-1, K); another assignment of rows needs
        no new trace. ``scalings`` and ``dropouts`` have one entry an adapter, one seed serves all. ``matrices`` is A
        of every adapter, then B of every adapter.
        """
        weight, weight_scale, bias = owner.operands()
        As, Bs = list(matrices[: len(scalings)]), list(matrices[len(scalings) :])
        rows = x.reshape(-1, x.shape[-1])
        forward = torch.ops.pyadapt.lora_rows_forward if registry.watched(x, weight, *matrices) else _lora_rows_forward
        y, S = forward(rows, weight, weight_scale, bias, As, Bs, scalings, dropouts, segments, seed, out_dtype)
        ctx.owner, ctx.scalings, ctx.dropouts = owner, scalings, dropouts
        ctx.save_for_backward(x, S, segments, seed, *matrices)
        return like_rows(y, x)

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, and of A and B of every adapter."""
        x, S, segments, seed, *matrices = ctx.saved_tensors
        weight, weight_scale, _ = ctx.owner.operands()
        need_dx = ctx.needs_input_grad[0]
        backward = torch.ops.pyadapt.lora_rows_backward if registry.watched(g, weight) else _lora_rows_backward
        dx, dAs, dBs = backward(
            g.reshape(-1, g.shape[-1]),
            x.reshape(-1, x.shape[-1]),
            weight,
            weight_scale,
            matrices[: len(ctx.scalings)],
            matrices[len(ctx.scalings) :],
            ctx.scalings,
            ctx.dropouts,
            segments,
            S,
            seed,
            need_dx,
        )
        return dx.view(x.shape) if need_dx else None, None, None, None, None, None, None, *dAs, *dBs
