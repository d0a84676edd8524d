"""DeepSpeed ZeRO-3: a parameter is an empty tensor with its part of the values beside it (`ds_tensor`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import nn

from .sharding import Sharding


class Zero3(Sharding):
    """Parameters that DeepSpeed has partitioned, by `deepspeed.zero.Init` or by its engine."""

    name = "DeepSpeed ZeRO-3"

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """See `Sharding.holds`."""
        return any(hasattr(parameter, "ds_id") for parameter in model.parameters())

    def whole(self, modules: Sequence[nn.Module], write: bool = False) -> contextlib.AbstractContextManager[None]:
        """See `Sharding.whole`."""
        import deepspeed

        parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)


SHARDING = Zero3
