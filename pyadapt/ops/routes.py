"""Which implementation serves an op: one table, in one place, that can be printed.

- ``fused``: the native product engine, the low-rank term in the same tile.
- ``skinny``: the native streaming kernel of a few rows (decoding).
- ``library``: torch's GEMM on W, or on panels of an int8 W, with the low-rank passes around it.
- ``reference``: plain torch in fp32 (fp64 for fp64).

``PYADAPT_ROUTE=fused|library|reference`` forces one wherever it can serve. The reasons and the measurements behind the
table are in docs/kernels.md.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyadapt import native

NATIVE = ("fused", "skinny")
FORCIBLE = ("fused", "library", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Up to this many rows of x the skinny kernel is the fastest: without AVX-512, with it, and with bf16 instructions over
# a bf16 W, which the others then need not widen.
SKINNY_ROWS, SKINNY_ROWS_AVX512, SKINNY_ROWS_BF16 = 32, 8, 2
# A library call's set-up and panels are worth their cost from this many multiplications on, and over a bf16 W, of which
# nothing has to be widened, also from this many elements of W on.
LIBRARY_PRODUCTS, LIBRARY_ELEMENTS_BF16 = 1 << 30, 1 << 21


@dataclass(frozen=True)
class Case:
    """One call, as far as the choice depends on it. In a backward, ``x`` is the gradient."""

    op: str  # "forward" or "backward"
    device: str
    x: torch.dtype
    weight: torch.dtype
    others: tuple[torch.dtype, ...]  # adapters, output
    weight_rows: bool  # whether W has unit stride along K
    M: int
    N: int
    K: int
    r: int
    isa: str | None  # None: no native kernels
    library_bf16: bool  # whether torch's bf16 GEMM runs on bf16 instructions

    def dtypes_fit(self) -> bool:
        """Whether the native kernels take these dtypes."""
        return (
            self.x in KERNEL_DTYPES
            and (self.weight in KERNEL_DTYPES or self.weight == torch.int8)
            and all(dtype in KERNEL_DTYPES for dtype in self.others)
        )

    def can(self, route: str) -> bool:
        """Whether a route can serve this case at all."""
        if route == "reference":
            return True
        if route == "library":
            return self.dtypes_fit() and self.weight in (self.x, torch.int8)
        return self.device == "cpu" and self.isa is not None and self.dtypes_fit()


@dataclass(frozen=True)
class Rule:
    """``route`` serves the cases that ``applies`` takes and no earlier rule took."""

    route: str
    reason: str
    applies: Callable[[Case], bool]


def _library_bf16(case: Case) -> bool:
    return case.x == torch.bfloat16 and case.library_bf16 and case.can("library")


def _is_skinny(case: Case) -> bool:
    if case.library_bf16 and case.x == case.weight == torch.bfloat16:
        rows = SKINNY_ROWS_BF16
    else:
        rows = SKINNY_ROWS_AVX512 if "avx512" in (case.isa or "") else SKINNY_ROWS
    return case.op == "forward" and case.weight_rows and rows >= case.M


def _is_large(case: Case) -> bool:
    elements = case.N * case.K
    many = case.M * elements >= LIBRARY_PRODUCTS
    return many or (case.weight != torch.int8 and elements >= LIBRARY_ELEMENTS_BF16)


RULES = (
    Rule(
        "reference",
        "a dtype that no kernel takes, such as float64",
        lambda case: not case.dtypes_fit(),
    ),
    Rule(
        "library",
        "a device without native kernels yet, 16-bit input: the library's GEMM in that dtype",
        lambda case: case.device != "cpu" and case.x != torch.float32 and case.can("library"),
    ),
    Rule(
        "reference",
        "a device without native kernels yet",
        lambda case: case.device != "cpu",
    ),
    Rule(
        "library",
        "no native kernels, bf16 instructions: the library's GEMM",
        lambda case: case.isa is None and _library_bf16(case),
    ),
    Rule(
        "reference",
        "no native kernels",
        lambda case: case.isa is None,
    ),
    Rule(
        "skinny",
        "forward of a few rows: W is read once, unpacked",
        _is_skinny,
    ),
    Rule(
        "library",
        "bf16 instructions, a large W: the library's bf16 GEMM is near the machine's peak",
        lambda case: _is_large(case) and _library_bf16(case),
    ),
    Rule(
        "fused",
        "everything else on the CPU",
        lambda case: True,
    ),
)


def choose(op: str, x: Tensor, weight: Tensor, rank: int, *others: torch.dtype) -> str:
    """The route of one call: x (M, K) in a forward, g (M, N) in a backward; ``others`` are further dtypes in play."""
    return _choose_for(op, x, x.dtype, weight, rank, others)


def _choose_for(
    op: str, x: Tensor, dtype: torch.dtype, weight: Tensor, rank: int, others: tuple[torch.dtype, ...]
) -> str:
    N, K = weight.shape
    return _choose(
        op,
        x.device.type,
        dtype,
        weight.dtype,
        others,
        weight.stride(1) == 1,
        x.shape[:-1].numel(),
        N,
        K,
        rank,
        native.isa(),
        _forced[-1] if _forced else _from_environment(),
    )


# What `native_pair` found, by what it depends on: a layer comes with the same few cases again and again.
_pairs: dict[tuple[Any, ...], tuple[str, str] | None] = {}
_MOST_PAIRS = 4096


def native_pair(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype, A: Tensor | None = None, B: Tensor | None = None
) -> tuple[str, str] | None:
    """The routes of a layer's forward and backward on x (..., K) if both are native kernels, else None.

    This is asked at each step of each layer, hence a key of what can be read off tensors cheaply.
    """
    # N and r are in B's shape, K in x's.
    shape, dtypes = (weight.shape, ()) if A is None or B is None else (B.shape, (A.dtype, B.dtype))
    key = (x.shape, x.dtype, x.is_cpu, shape, dtypes, weight.stride(), weight.dtype, out_dtype, native.isa())
    try:
        return _pairs[key]
    except KeyError:
        pass
    rank = 0 if A is None else A.shape[0]
    forward = _choose_for("forward", x, x.dtype, weight, rank, (*dtypes, out_dtype))
    backward = _choose_for("backward", x, out_dtype, weight, rank, (x.dtype, *dtypes))
    pair = (forward, backward) if forward in NATIVE and backward in NATIVE else None
    if len(_pairs) >= _MOST_PAIRS:
        _pairs.clear()
    _pairs[key] = pair
    return pair


def native_serves(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether native kernels take a CPU tensor, for the passes that have one native form only."""
    forced = _forced[-1] if _forced else _from_environment()
    fit = tensor.device.type == "cpu" and all(dtype in KERNEL_DTYPES for dtype in dtypes)
    return fit and forced != "reference" and native.available()


@functools.lru_cache(maxsize=4096)
def _choose(
    op: str,
    device: str,
    x: torch.dtype,
    weight: torch.dtype,
    others: tuple[torch.dtype, ...],
    weight_rows: bool,
    M: int,
    N: int,
    K: int,
    r: int,
    isa: str | None,
    forced: str | None,
) -> str:
    case = Case(op, device, x, weight, others, weight_rows, M, N, K, r, isa, library_has_bf16())
    if forced is not None and case.can(forced):
        return forced
    return explain(case).route


def predict(op: str, device: str, x: torch.dtype, weight: torch.dtype, M: int, N: int, K: int, r: int) -> Rule:
    """The rule that a call of these dtypes and sizes would fall under, fp32 adapters assumed; for reports and plans."""
    isa = native.isa() if device == "cpu" else None
    case = Case(op, device, x, weight, (torch.float32,), True, M, N, K, r, isa, library_has_bf16())
    forced_route = _forced[-1] if _forced else _from_environment()
    if forced_route is not None and case.can(forced_route):
        return Rule(forced_route, "forced", lambda case: True)
    return explain(case)


def explain(case: Case) -> Rule:
    """The rule that decides a case."""
    return next(rule for rule in RULES if rule.applies(case))


def table() -> list[tuple[str, str]]:
    """(route, reason) in the order in which they are tried, for printing."""
    return [(rule.route, rule.reason) for rule in RULES]


@functools.cache
def library_has_bf16() -> bool:
    """Whether torch's CPU bf16 GEMM runs on bf16 instructions; without them it is slower than fp32 by far."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    flags = torch.backends.cpu.get_cpu_capability()
    return bool(supported and supported()) and "AVX512" in flags and _cpu_has_bf16()


@functools.cache
def _cpu_has_bf16() -> bool:
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)


# --- forcing a route ---

_forced: list[str] = []


@functools.cache
def _from_environment() -> str | None:
    value = os.environ.get("PYADAPT_ROUTE")
    return _known(value, "PYADAPT_ROUTE") if value else None


def _known(route: str, source: str) -> str:
    if route not in FORCIBLE:
        raise ValueError(f"{source} is {route!r}; it must be one of {', '.join(FORCIBLE)}")
    return route


@contextmanager
def forced(route: str) -> Iterator[None]:
    """Force a route inside a with block, wherever it can serve."""
    _forced.append(_known(route, "the route"))
    _pairs.clear()
    try:
        yield
    finally:
        _forced.pop()
        _pairs.clear()
