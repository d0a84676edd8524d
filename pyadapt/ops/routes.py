"""Which implementation serves an op: one table, in one place, that can be printed.

- ``fused``: the native product with the low-rank term in the same tile, on the CPU or on CUDA.
- ``skinny``: the native streaming kernel of a few rows (decoding).
- ``library``: torch's GEMM on W, or on panels of an int8 W, with the low-rank passes around it.
- ``reference``: plain torch in fp32 (fp64 for fp64).

On CUDA the table's answer between ``fused`` and ``library`` is a first guess: where it may, ``run`` measures both once
a shape and remembers the faster one (``autotune.py``).

``PYADAPT_ROUTE=fused|library|reference`` forces one wherever it can serve. The reasons and the measurements behind the
table are in docs/kernels.md.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyadapt import native

from . import autotune

NATIVE = ("fused", "skinny")
FORCIBLE = ("fused", "library", "reference")
TUNED = ("fused", "library")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Up to this many rows of x the skinny kernel is the fastest: without AVX-512, with it, and with bf16 instructions over
# a bf16 W, which the others then need not widen.
SKINNY_ROWS, SKINNY_ROWS_AVX512, SKINNY_ROWS_BF16 = 32, 8, 2
# A library call's set-up and panels are worth their cost from this many multiplications on, and over a bf16 W, of which
# nothing has to be widened, also from this many elements of W on.
LIBRARY_PRODUCTS, LIBRARY_ELEMENTS_BF16 = 1 << 30, 1 << 21

# On CUDA the skinny kernel streams W for up to this many rows, and torch's GEMM has matrix instructions of Hopper and
# later that the fused kernel has not: guesses, for no GPU has measured them yet (docs/kernels.md).
SKINNY_ROWS_CUDA, TUNED_ROWS, LIBRARY_ROWS_HOPPER = 16, 64, 512


@dataclass(frozen=True)
class Case:
    """One call, as far as the choice depends on it. In a backward, ``x`` is the gradient."""

    op: str  # "forward" or "backward"
    device: str  # whose kernels would serve: "cpu", "cuda", ...
    x: torch.dtype
    weight: torch.dtype
    out: torch.dtype  # of y, or of dx
    adapters: tuple[torch.dtype, ...]
    weight_rows: bool  # whether W has unit stride along K
    weight_columns: bool  # along N
    M: int
    N: int
    K: int
    r: int
    isa: str | None  # what native kernels run on: "avx512", "sm_90"; None: there are none
    library_bf16: bool  # whether torch's bf16 GEMM runs on bf16 instructions

    def dtypes_fit(self) -> bool:
        """Whether some native kernel takes these dtypes."""
        return (
            self.x in KERNEL_DTYPES
            and (self.weight in KERNEL_DTYPES or self.weight == torch.int8)
            and all(dtype in KERNEL_DTYPES for dtype in (self.out, *self.adapters))
        )

    def cuda_fits(self) -> bool:
        """Whether the CUDA kernels take this: one 16-bit dtype, which W has too or is int8, and W as it lies."""
        return (
            self.dtypes_fit()
            and self.x != torch.float32
            and self.out == self.x
            and self.weight in (self.x, torch.int8)
            and (self.weight_rows or self.weight_columns)
            and (self.x != torch.bfloat16 or self.compute_capability() >= 80)
        )

    def compute_capability(self) -> int:
        """75, 80, ... of a CUDA device with kernels; 0 otherwise."""
        return int(self.isa.removeprefix("sm_")) if self.device == "cuda" and self.isa else 0

    def tunable(self) -> bool:
        """Whether measuring is worth its time: a few rows are bound by memory in any way."""
        return self.device == "cuda" and self.M >= TUNED_ROWS

    def can(self, route: str) -> bool:
        """Whether a route can serve this case at all."""
        if route == "reference":
            return True
        if route == "library":
            # A GPU's GEMM in 16 bits is worth casting W for, as autocast does; a CPU's engine widens what it reads.
            cast = self.device != "cpu" and self.x != torch.float32
            return self.dtypes_fit() and (cast or self.weight in (self.x, torch.int8))
        if self.isa is None:
            return False
        return self.dtypes_fit() if self.device == "cpu" else self.device == "cuda" and self.cuda_fits()


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


def _is_skinny_on_cuda(case: Case) -> bool:
    return case.op == "forward" and case.weight_rows and case.M <= SKINNY_ROWS_CUDA


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
        "a GPU without native kernels for this (dtypes, architecture, a W that torch must copy), 16-bit input",
        lambda case: case.device != "cpu" and not case.can("fused") and case.x != torch.float32 and case.can("library"),
    ),
    Rule(
        "reference",
        "a GPU without native kernels for this (dtypes, architecture, a W that torch must copy)",
        lambda case: case.device != "cpu" and not case.can("fused"),
    ),
    Rule(
        "skinny",
        "CUDA, forward of a few rows: W is streamed once",
        lambda case: case.device != "cpu" and _is_skinny_on_cuda(case),
    ),
    Rule(
        "library",
        "CUDA from sm_90 on, many rows: the library's GEMM has matrix instructions that ours has not (tuned)",
        lambda case: case.compute_capability() >= 90 and case.M >= LIBRARY_ROWS_HOPPER,
    ),
    Rule(
        "fused",
        "CUDA, everything else (tuned)",
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


def case_of(
    op: str, x: Tensor, weight: Tensor, rank: int, out: torch.dtype, adapters: tuple[torch.dtype, ...] = ()
) -> Case:
    """The case of one call: x (M, K) in a forward, g (M, N) in a backward; ``out`` is the dtype of y, or of dx."""
    N, K = weight.shape
    return Case(
        op=op,
        device=native.device_kind(x),
        x=x.dtype,
        weight=weight.dtype,
        out=out,
        adapters=adapters,
        weight_rows=weight.stride(1) == 1,
        weight_columns=weight.stride(0) == 1,
        M=x.shape[:-1].numel(),
        N=N,
        K=K,
        r=rank,
        isa=isa_of(x),
        library_bf16=library_has_bf16(),
    )


def choose(case: Case) -> str:
    """The route of a case by the table, or the forced one."""
    return _choose(case, _forced_route())


def run(
    case: Case,
    forms: Mapping[str, Callable[..., Any]],
    device: torch.device,
    arguments: tuple[Any, ...],
    dropout: bool = False,
) -> Any:
    """Call the form of an op that serves a case best: by the table, or on CUDA by measurement."""
    route = choose(case)
    tuned = case.tunable() and route in TUNED and device.type == "cuda" and _forced_route() is None
    if tuned and all(map(case.can, TUNED)):
        shape = (case.M, case.N, case.K, case.r)
        key = autotune.key_of(case.op, case.x, case.weight, case.weight_rows, *shape, dropout)
        known = autotune.measurements(device)
        measured = known.remembered(key, TUNED)
        if measured is None:
            candidates = {name: functools.partial(forms[name], *arguments) for name in TUNED}
            measured = known.best(key, candidates, autotune.cuda_timer(device))
        route = measured or route
    return forms[route](*arguments)


def isa_of(x: Tensor) -> str | None:
    """What the native kernels for a tensor run on; None where there are none."""
    kind = native.device_kind(x)
    if kind == "cpu":
        return native.isa()
    return native.cuda_isa(x.device.index or 0) if kind == "cuda" else None


# What `pair` found, by what it depends on: a layer comes with the same few cases again and again.
_pairs: dict[tuple[Any, ...], tuple[str, str] | None] = {}
_MOST_PAIRS = 4096


def native_pair(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> tuple[str, str] | None:
    """``pair`` where both routes are native kernels, else None."""
    found = pair(x, weight, out_dtype)
    return found if found is not None and found[0] in NATIVE and found[1] in NATIVE else None


def pair(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype, A: Tensor | None = None, B: Tensor | None = None
) -> tuple[str, str] | None:
    """The routes of a layer's forward and backward on x (..., K); None where ``run`` would measure them.

    This is asked at each step of each layer, hence a key of what can be read off tensors cheaply.
    """
    # N and r are in B's shape, K in x's.
    shape, dtypes = (weight.shape, ()) if A is None or B is None else (B.shape, (A.dtype, B.dtype))
    key = (x.shape, x.dtype, x.get_device(), shape, dtypes, weight.stride(), weight.dtype, out_dtype, isa_of(x))
    try:
        return _pairs[key]
    except KeyError:
        pass
    rank = 0 if A is None else A.shape[0]
    forward = case_of("forward", x, weight, rank, out_dtype, dtypes)
    backward = replace(forward, op="backward", x=out_dtype, out=x.dtype)
    found = None if x.is_cuda and forward.tunable() else (choose(forward), choose(backward))
    if len(_pairs) >= _MOST_PAIRS:
        _pairs.clear()
    _pairs[key] = found
    return found


def native_serves(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether native kernels take a tensor, for the passes that have one native form only.

    On the CPU any floating dtypes, on CUDA one of 16 bits.
    """
    if _forced_route() == "reference" or isa_of(tensor) is None:
        return False
    if native.device_kind(tensor) == "cpu":
        return all(dtype in KERNEL_DTYPES for dtype in dtypes)
    half = (torch.float16,) if isa_of(tensor) == "sm_75" else (torch.float16, torch.bfloat16)
    return all(dtype in half and dtype == dtypes[0] for dtype in dtypes)


@functools.lru_cache(maxsize=4096)
def _choose(case: Case, forced: str | None) -> str:
    if forced is not None and case.can(forced):
        return forced
    return explain(case).route


def predict(op: str, device: str, x: torch.dtype, weight: torch.dtype, M: int, N: int, K: int, r: int) -> Rule:
    """The rule that a call of these dtypes and sizes would fall under, fp32 adapters assumed; for reports and plans."""
    isa = native.isa() if device == "cpu" else native.cuda_isa() if device == "cuda" else None
    case = Case(op, device, x, weight, x, (torch.float32,), True, False, M, N, K, r, isa, library_has_bf16())
    forced_route = _forced_route()
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


def _forced_route() -> str | None:
    return _forced[-1] if _forced else _from_environment()


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
