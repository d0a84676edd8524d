"""The seed of a counter-based dropout mask."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed() -> Tensor:
    """One int64 on the CPU from torch's default generator.

    Drawn from the generator whose state gradient checkpointing saves and restores, so that a recomputed forward makes
    the same mask. A tensor rather than a number: reading a number out would break a compiled graph.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device="cpu")
