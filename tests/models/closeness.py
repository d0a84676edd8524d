"""How near is near enough for whole models, by dtype and by what is compared.

|a - b| <= tolerance * (|b| + max |b|)
"""

from __future__ import annotations

import torch
from torch import Tensor

# What is compared -> dtype -> tolerance. "layer": one layer's output. "model": logits through a tiny model.
# "gradient": of an adapter's weight through it. "loss": over a few optimizer steps from the same start. "merged": the
# weights or the output of a merged model, whose weights were rounded once more.
TOLERANCE: dict[str, dict[torch.dtype, float]] = {
    "layer": {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2},
    "model": {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 3e-2},
    "gradient": {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2},
    "loss": {torch.float32: 1e-5, torch.bfloat16: 2e-2},
    "merged": {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 3e-2},
}


def assert_near(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Compare by the table; `dtype` is the coarsest one on the way where it is not that of `expected`."""
    tolerance = TOLERANCE[what][dtype or expected.dtype]
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    assert bool(torch.isfinite(expected).all())
    scale = expected.abs() + (expected.abs().max() if expected.numel() else 0.0)
    excess = (actual - expected).abs() - tolerance * scale
    assert bool((excess <= 0).all()), (
        f"{what}: off by {float((actual - expected).abs().max()):.3e} where {tolerance:.0e} of "
        f"{float(expected.abs().max()):.3e} is allowed"
    )
