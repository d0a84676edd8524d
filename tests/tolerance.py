"""The one tolerance table of the tests, by dtype and operation. Nobody invents a looser one in a test.

A value passes when |value - exact| <= eps |exact| + floor largest: eps is the rounding of the store, floor what a sum
may lose to cancellation, where largest is max|exact|, or that of a part when the parts of a sum may cancel. The dtype
of a comparison is the coarsest that took part in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Relative to the element (eps), and to the largest element or part (floor)."""

    eps: float
    floor: float


TABLE = {
    # One product, summed in fp32 and stored once; the library route rounds a second time.
    ("product", torch.float64): Tolerance(1e-12, 1e-13),
    ("product", torch.float32): Tolerance(1e-5, 3e-6),
    ("product", torch.float16): Tolerance(2e-3, 1e-3),
    ("product", torch.bfloat16): Tolerance(1.2e-2, 6e-3),
    # A value that is rounded once and not summed.
    ("store", torch.float64): Tolerance(1e-15, 0.0),
    ("store", torch.float32): Tolerance(1.2e-7, 0.0),
    ("store", torch.float16): Tolerance(1e-3, 1e-7),
    ("store", torch.bfloat16): Tolerance(4e-3, 0.0),
    # The output of one layer of a model.
    ("layer", torch.float64): Tolerance(1e-12, 1e-12),
    ("layer", torch.float32): Tolerance(2e-6, 2e-6),
    ("layer", torch.bfloat16): Tolerance(1e-2, 1e-2),
    # Logits through a tiny model.
    ("model", torch.float64): Tolerance(1e-11, 1e-11),
    ("model", torch.float32): Tolerance(5e-6, 5e-6),
    ("model", torch.bfloat16): Tolerance(3e-2, 3e-2),
    # The gradient of an adapter's weight through it.
    ("gradient", torch.float64): Tolerance(1e-11, 1e-11),
    ("gradient", torch.float32): Tolerance(1e-5, 1e-5),
    ("gradient", torch.bfloat16): Tolerance(4e-2, 4e-2),
    # Over a few optimizer steps from the same start.
    ("loss", torch.float32): Tolerance(1e-5, 1e-5),
    ("loss", torch.bfloat16): Tolerance(2e-2, 2e-2),
    # The weights or the output of a merged model, whose weights were rounded once more.
    ("merged", torch.float64): Tolerance(1e-11, 1e-11),
    ("merged", torch.float32): Tolerance(5e-6, 5e-6),
    ("merged", torch.bfloat16): Tolerance(3e-2, 3e-2),
}


def tolerance(operation: str, dtype: torch.dtype) -> Tolerance:
    """The row of the table."""
    return TABLE[operation, dtype]


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The floating dtype with the largest rounding step; integers are exact and do not count."""
    return max((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)


def assert_close(
    value: Tensor,
    exact: Tensor,
    operation: str,
    dtype: torch.dtype,
    what: str = "value",
    part: Tensor | None = None,
) -> None:
    """Compare with an fp64 oracle under the table's row; the message says by how much it is off."""
    assert value.shape == exact.shape, f"{what} has shape {tuple(value.shape)}, wanted {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    row = tolerance(operation, dtype)
    exact = exact.detach().double()
    assert bool(torch.isfinite(exact).all()), f"the oracle of {what} is not finite"
    largest = exact.abs().max() if part is None else torch.maximum(exact.abs().max(), part.abs().max())
    excess = (value.detach().double() - exact).abs() - (row.eps * exact.abs() + row.floor * largest)
    # Written so that a NaN fails.
    assert bool((excess <= 0).all()), (
        f"{what} in {dtype}: off by {excess.nan_to_num(nan=float('inf')).max().item():.3g} more than {row} allows; "
        f"largest exact value {exact.abs().max().item():.3g}"
    )


def assert_near(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Compare two ways of computing `what`; `dtype` is the coarsest one on the way, or that of `expected`."""
    assert_close(actual, expected, what, dtype or expected.dtype, what)
