"""DeepSpeed ZeRO-3: a parameter is an empty tensor with its part of the values beside it (`ds_tensor`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import Sharding


class Zero3(Sharding):
    """Parameters that DeepSpeed has partitioned, by `deepspeed.zero.Init` or by its engine."""

    name = "DeepSpeed ZeRO-3"
    shards_plain_models = True

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """See `Sharding.holds`."""
        return any(hasattr(parameter, "ds_id") for parameter in model.parameters())

    def whole(self, modules: Sequence[nn.Module], write: bool = False) -> contextlib.AbstractContextManager[None]:
        """See `Sharding.whole`."""
        import deepspeed

        parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)

    def gradients(self, modules: Sequence[nn.Module]) -> list[dict[str, Tensor | None]]:
        """See `Sharding.gradients`; DeepSpeed keeps them until the next backward.

        Where the optimizer's state is on the CPU it has clipped and unscaled what it keeps, else only a copy of it.
        """
        import deepspeed

        found: list[dict[str, Tensor | None]] = []
        for module in modules:
            found.append({})
            for name, parameter in module.named_parameters(recurse=False):
                optimizer: Any = getattr(parameter, "_z3_optimizer", None)
                if optimizer is None or not parameter.requires_grad or optimizer._global_grad_norm == 0:
                    found[-1][name] = None
                    continue
                gradient = deepspeed.utils.safe_get_full_grad(parameter)
                found[-1][name] = gradient if optimizer.offload_optimizer else gradient / _scale_of_step(optimizer)
        return found

    def keep(self, modules: Sequence[nn.Module]) -> list[tuple[Any, Tensor]]:
        """See `Sharding.keep`."""
        parameters = {parameter: None for module in modules for parameter in module.parameters(recurse=False)}
        return [(parameter, parameter.ds_tensor.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def put_back(self, kept: Sequence[tuple[Any, Tensor]]) -> None:
        """See `Sharding.put_back`; small parameters, which are whole everywhere, are let go first."""
        for parameter, values in kept:
            parameter.partition()
            parameter.ds_tensor.copy_(values)


def _scale_of_step(optimizer: Any) -> float:
    """What DeepSpeed has divided the gradients by in its latest step: to undo the loss's scaling, and to clip them."""
    scale = float(optimizer.loss_scale)
    if optimizer.clip_grad > 0:
        scale *= max(1.0, (float(optimizer._global_grad_norm) + 1e-6) / optimizer.clip_grad)
    return scale


SHARDING = Zero3
