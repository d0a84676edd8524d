"""DeepSpeed ZeRO-3: a parameter is an empty tensor with its part of the values beside it (`ds_tensor`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import Sharding, engine_of


class Zero3(Sharding):
    """Parameters that DeepSpeed has partitioned, by `deepspeed.zero.Init` or by its engine."""

    name = "DeepSpeed ZeRO-3"
    shards_plain_models = True

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """See `Sharding.holds`."""
        return any(_is_partitioned(parameter) for parameter in model.parameters())

    @contextlib.contextmanager
    def whole(self, modules: Sequence[nn.Module], write: bool = False) -> Iterator[None]:
        """See `Sharding.whole`; what another block, or a forward, has gathered already is left to that."""
        import deepspeed

        every: list[Any] = [
            parameter
            for module in modules
            for parameter in module.parameters(recurse=False)
            if _is_partitioned(parameter)
        ]
        if not write:
            every = [parameter for parameter in every if parameter.ds_status.name == "NOT_AVAILABLE"]
        before = [(p, p.ds_tensor.detach().clone()) for p in every if write and _is_optimized(p)]
        with deepspeed.zero.GatheredParameters(every, modifier_rank=0 if write else None):
            yield
        for parameter, part in before:
            _tell_optimizer(parameter, part)

    @contextlib.contextmanager
    def replacing(self, module: nn.Module) -> Iterator[None]:
        """See `Sharding.replacing`."""
        before: Any = next(parameter for parameter in module.parameters(recurse=False) if _is_partitioned(parameter))
        with self.whole([module]):
            yield
        new = [parameter for parameter in module.parameters(recurse=False) if not _is_partitioned(parameter)]
        # As those before are: in the same group of ranks, on the same device. Takes the values of the first rank.
        before.convert_to_zero_parameters(param_list=new)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See `Sharding.running`: each module's own parameters are gathered for its forward, without gradients."""
        if engine_of(self.model) is not None:
            yield
            return
        gathered: dict[nn.Module, contextlib.AbstractContextManager[None]] = {}

        def before(module: nn.Module, *args: Any) -> None:
            gathered[module] = self.whole([module])
            gathered[module].__enter__()

        def after(module: nn.Module, *args: Any) -> None:
            gathered.pop(module).__exit__(None, None, None)

        handles = []
        for module in self.model.modules():
            if any(_is_partitioned(parameter) for parameter in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in list(gathered):
                after(module)

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
                if not _is_optimized(parameter) or optimizer._global_grad_norm == 0:
                    found[-1][name] = None
                    continue
                gradient = deepspeed.utils.safe_get_full_grad(parameter)
                found[-1][name] = gradient if optimizer.offload_optimizer else gradient / _scale_of_step(optimizer)
        return found

    def keep(self, modules: Sequence[nn.Module]) -> list[tuple[Any, Tensor]]:
        """See `Sharding.keep`."""
        every: list[Any] = [parameter for module in modules for parameter in module.parameters(recurse=False)]
        parameters = dict.fromkeys(parameter for parameter in every if _is_partitioned(parameter))
        return [(parameter, parameter.ds_tensor.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def put_back(self, kept: Sequence[tuple[Any, Tensor]]) -> None:
        """See `Sharding.put_back`; small parameters, which are whole everywhere, are let go first."""
        for parameter, values in kept:
            parameter.partition()
            parameter.ds_tensor.copy_(values)


def _is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def _is_optimized(parameter: Any) -> bool:
    return parameter.requires_grad and hasattr(parameter, "_z3_optimizer")


@torch.no_grad()
def _tell_optimizer(parameter: Any, before: Tensor) -> None:
    """Let the optimizer's own copy of this rank's part have what was written to it; the rest keeps its fp32 values."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    part = parameter.ds_tensor
    own = safe_get_local_fp32_param(parameter)
    written = (part != before).to(own.device)
    safe_set_local_fp32_param(parameter, torch.where(written, part.to(own.device, own.dtype), own))


def _scale_of_step(optimizer: Any) -> float:
    """What DeepSpeed has divided the gradients by in its latest step: to undo the loss's scaling, and to clip them."""
    scale = float(optimizer.loss_scale)
    if optimizer.clip_grad > 0:
        scale *= max(1.0, (float(optimizer._global_grad_norm) + 1e-6) / optimizer.clip_grad)
    return scale


SHARDING = Zero3
