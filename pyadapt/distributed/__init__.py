"""Training over several processes: what pyadapt does more where an engine shards the model, and what it checks.

No engine of our own: DeepSpeed ZeRO-3, FSDP1, FSDP2 and DDP train a wrapped model as they are (docs/distributed.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accelerate_checkpoint import checkpoint_adapters as checkpoint_adapters
    from .agreement import RankError as RankError
    from .policy import fsdp_auto_wrap_policy as fsdp_auto_wrap_policy
    from .preparing import ShardingReport as ShardingReport
    from .preparing import prepare_for_sharding as prepare_for_sharding

# Public name -> its module. Loaded when first used: the rest of the package is built on `sharding` and `agreement`.
_HOMES = {
    "RankError": "agreement",
    "ShardingReport": "preparing",
    "checkpoint_adapters": "accelerate_checkpoint",
    "fsdp_auto_wrap_policy": "policy",
    "prepare_for_sharding": "preparing",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
