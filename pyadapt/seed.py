"""The seed of a counter-based dropout mask."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seed(x: Tensor) -> Tensor:
    """One int64 from torch's default generator of x's device, on that device if it is a GPU, else on the CPU.

    Drawn from the generator whose state gradient checkpointing saves and restores, so that a recomputed forward makes
    the same mask; on a GPU a captured graph draws anew at each replay. A tensor rather than a number: reading a number
    out would break a compiled graph, and would wait for a GPU.
    """
    device = x.device if x.is_cuda else torch.device("cpu")
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
