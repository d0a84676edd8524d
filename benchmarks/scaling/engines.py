"""Giving a model to an engine, and one training step under it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ENGINES = ("ddp", "fsdp2", "fsdp1", "zero3", "zero3 offload")

# Nothing is fetched ahead and nothing is kept: the least memory. The reduction's buffer is as large as it is told to
# be, whatever there is to reduce; its default of 5e8 values would be 2 GB of fp32.
ZERO3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
OFFLOAD = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}


@dataclass
class Handle:
    """A model in the hands of an engine.

    Attributes:
        call: what is called in the model's place.
        optimizer: over the trained parameters; None where the engine has its own.
        engine: DeepSpeed's engine, or None.
        accumulate: micro-batches a step.
        autocast: whether the forward runs under bf16 autocast (DeepSpeed has been told when it was started).
    """

    call: Any
    optimizer: torch.optim.Optimizer | None
    engine: Any = None
    accumulate: int = 1
    autocast: bool = False

    def step(self, inputs: dict[str, Tensor], mark: Callable[[str], None]) -> None:
        """One optimizer step, with a mark behind each of its parts."""
        for micro in range(self.accumulate):
            with self._synchronised(micro == self.accumulate - 1):
                self._forward_backward(inputs, mark)
        if self.optimizer is not None:
            self.optimizer.step()
            mark("step")
            self.optimizer.zero_grad(set_to_none=True)
        mark("end")

    def _forward_backward(self, inputs: dict[str, Tensor], mark: Callable[[str], None]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast and self.engine is None):
            loss = self.call(**inputs)
        loss = loss if isinstance(loss, Tensor) else loss.loss
        mark("forward")
        if self.engine is None:
            loss.backward()
            mark("backward")
        else:
            self.engine.backward(loss)
            mark("backward")
            self.engine.step()
            mark("step")

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are reduced for the last micro-batch alone, where the engine lets them wait."""
        if hasattr(self.call, "set_requires_gradient_sync"):
            self.call.set_requires_gradient_sync(last)
        waits = not last and self.engine is None and hasattr(self.call, "no_sync")
        with self.call.no_sync() if waits else contextlib.nullcontext():
            yield


@dataclass(frozen=True)
class Plan:
    """How a training is set up.

    Attributes:
        engine: one of `ENGINES`.
        accumulate: micro-batches a step.
        autocast: bf16 autocast.
        reshard: whether FSDP2 frees a block's parameters behind its forward; False is FSDP1's SHARD_GRAD_OP.
        alone: whether FSDP1 has adapters as units of their own.
        zero3: further keys of DeepSpeed's `zero_optimization`.
    """

    engine: str
    accumulate: int = 1
    autocast: bool = False
    reshard: bool = True
    alone: bool = True
    zero3: dict[str, Any] = field(default_factory=dict)


def start(model: Any, plan: Plan) -> Handle:
    """Give `model`, whose trained parameters AdamW is to train, to the engine."""
    if plan.engine.startswith("zero3"):
        return _start_zero3(model, plan)
    call: Any = None
    if plan.engine == "ddp":
        call = nn.parallel.DistributedDataParallel(model)
    elif plan.engine == "fsdp2":
        call = _shard_fsdp2(model, plan.reshard)
    else:
        call = _shard_fsdp1(model, plan)
    return Handle(call, adamw(call), accumulate=plan.accumulate, autocast=plan.autocast)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer's blocks, by the names that transformers says not to split."""
    names: Any = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def _shard_fsdp2(model: Any, reshard: bool) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh)


def _shard_fsdp1(model: Any, plan: Plan) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    from pyadapt.distributed import fsdp_auto_wrap_policy

    whole_blocks = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={type(block) for block in blocks(model)}
    )
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if plan.alone else whole_blocks,
        sharding_strategy=ShardingStrategy.FULL_SHARD if plan.reshard else ShardingStrategy.SHARD_GRAD_OP,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def _start_zero3(model: Any, plan: Plan) -> Handle:
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    zero = {
        **ZERO3,
        "reduce_bucket_size": trained,
        **(OFFLOAD if plan.engine.endswith("offload") else {}),
        **plan.zero3,
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": plan.accumulate,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if plan.autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)
    return Handle(engine, None, engine, plan.accumulate, plan.autocast)
