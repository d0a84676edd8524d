"""Peak memory of this process so far."""

from __future__ import annotations

import sys


def peak_bytes() -> int | None:
    """The largest resident size so far, in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes() -> int | None:
    """The largest GPU memory that torch has held so far, in bytes; None without a GPU in use."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
