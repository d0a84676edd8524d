"""Training a model under each engine, and alone, step by step on the same global batches.

Every function here runs on a rank of a gang (see `gang`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyadapt.layer import saved_modules
from pyadapt.method import AdapterUnit

ENGINES = ("ddp", "zero3", "fsdp1", "fsdp1_flat", "fsdp2", "fsdp2_units")

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    # DeepSpeed's own default is 1.0.
    "gradient_clipping": 0.0,
    # Threshold 0: or the tiny parameters of a test are never partitioned, and it proves nothing.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


@dataclass
class Options:
    """How a training goes.

    Attributes:
        steps: optimizer steps.
        accumulate: micro-batches a step.
        clip: largest norm of the gradient, or None.
        checkpointing: None, "reentrant" or "non-reentrant".
        autocast: whether it runs under bf16 autocast, or DeepSpeed's own.
        mixed: whether it runs under FSDP's own mixed precision: bf16 parameters, gradients reduced in fp32.
        backend: compile what is called with this backend of torch.compile.
        optimizer: makes the optimizer.
        zero3: further keys of DeepSpeed's configuration.
        after_step: called with the model and the number of the step, behind each optimizer step.
    """

    steps: int = 3
    accumulate: int = 1
    clip: float | None = None
    checkpointing: str | None = None
    autocast: bool = False
    mixed: bool = False
    backend: str | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = field(
        default=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    zero3: dict[str, Any] = field(default_factory=dict)
    after_step: Callable[[Any, int], None] | None = None


def train(model: Any, engine: str | None, batch: Callable[[int], dict[str, Tensor]], options: Options) -> list[float]:
    """Train `model` in place and give the loss of each global batch.

    Args:
        model: a wrapped model, the same on every rank.
        engine: one of `ENGINES`, or None for this process alone.
        batch: the global batch of each micro-step by its number; a rank takes its rows of it.
        options: see there.
    """
    model.train()
    if options.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": options.checkpointing == "reentrant"})
        model.enable_input_require_grads()
    runner = start(model, engine, options)
    losses = []
    for step in range(options.steps):
        total = 0.0
        for micro in range(options.accumulate):
            inputs = batch(step * options.accumulate + micro)
            last = micro == options.accumulate - 1
            total += runner.micro_step(inputs if engine is None else rows_of_rank(inputs), last) / options.accumulate
        runner.step()
        losses.append(total)
        if options.after_step is not None:
            options.after_step(model, step + 1)
    return losses


def rows_of_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows that this rank has of a global batch."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return {key: value.chunk(ranks)[rank] for key, value in batch.items()}


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a number over the ranks."""
    value = value.detach().double().clone()
    dist.all_reduce(value)
    return float(value / dist.get_world_size())


@dataclass
class Runner:
    """A model in the hands of an engine.

    Attributes:
        call: what is called in the model's place.
        optimizer: over the trained parameters, None where the engine has its own.
        options: see `train`.
        alone: whether there is no engine.
        engine: DeepSpeed's engine, or None.
    """

    call: Any
    optimizer: Any
    options: Options
    alone: bool = False
    engine: Any = None

    def micro_step(self, inputs: dict[str, Tensor], last: bool) -> float:
        """Forward and backward of one micro-batch; the global loss."""
        with self._precision(), self._synchronised(last):
            loss = self.call(**inputs).loss
            if self.engine is not None:
                self.engine.set_gradient_accumulation_boundary(last)
                self.engine.backward(loss)
            else:
                (loss / self.options.accumulate).backward()
        if self.engine is not None and not last:
            self.engine.step()
        return float(loss.detach()) if self.alone else mean_over_ranks(loss)

    def step(self) -> None:
        """The optimizer step."""
        if self.engine is not None:
            self.engine.step()
            return
        if self.options.clip is not None:
            self._clip(self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _clip(self, norm: float) -> None:
        if hasattr(self.call, "clip_grad_norm_"):
            self.call.clip_grad_norm_(norm)
        else:
            parameters = [parameter for parameter in self.call.parameters() if parameter.requires_grad]
            torch.nn.utils.clip_grad_norm_(parameters, norm)

    def _precision(self) -> Any:
        # DeepSpeed and FSDP have been told when they were started.
        return torch.autocast("cpu", torch.bfloat16, enabled=self.options.autocast and self.engine is None)

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        if last or self.engine is not None or not hasattr(self.call, "no_sync"):
            yield
        else:
            with self.call.no_sync():
                yield


def start(model: Any, engine: str | None, options: Options) -> Runner:
    """Give `model` to an engine."""

    def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
        return options.optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])

    if engine is None:
        return Runner(model, optimizer_of(model), options, alone=True)
    if engine == "ddp":
        return Runner(nn.parallel.DistributedDataParallel(model), optimizer_of(model), options)
    if engine == "zero3":
        return start_zero3(model, optimizer_of(model), options)
    if engine.startswith("fsdp2"):
        call = shard_fsdp2(model, units=engine == "fsdp2_units", mixed=options.mixed)
    else:
        call = shard_fsdp1(model, use_orig_params=engine == "fsdp1", mixed=options.mixed)
    optimizer = optimizer_of(call)
    return Runner(call if options.backend is None else torch.compile(call, backend=options.backend), optimizer, options)


def start_zero3(model: Any, optimizer: Any, options: Options) -> Runner:
    """Under DeepSpeed ZeRO-3."""
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo")
    config: dict[str, Any] = {**ZERO3, "gradient_accumulation_steps": options.accumulate}
    if options.clip is not None:
        config["gradient_clipping"] = options.clip
    if options.autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config |= options.zero3
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return Runner(engine, None, options, engine=engine)


def shard_fsdp2(model: Any, units: bool = False, mixed: bool = False) -> Any:
    """Each block of the model a group, and the rest one.

    Args:
        model: a wrapped model.
        units: whether what is trained are groups of their own, inside of the blocks.
        mixed: see `Options.mixed`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    for module in [*(trained_modules(model) if units else ()), *blocks(model)]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def shard_fsdp1(model: Any, use_orig_params: bool, mixed: bool = False) -> Any:
    """As `pyadapt.distributed.fsdp_auto_wrap_policy` says: blocks, and what is trained as units of its own."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    from pyadapt.distributed import fsdp_auto_wrap_policy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        mixed_precision=MixedPrecision(torch.bfloat16, torch.float32) if mixed else None,
    )


def trained_modules(model: Any) -> list[nn.Module]:
    """The units of the adapters, and the trained copies of modules."""
    copies = [copy for _, module in saved_modules(model) for copy in module.copies.values()]
    units = [module for module in model.modules() if isinstance(module, AdapterUnit) and list(module.parameters())]
    return units + copies


def blocks(model: Any) -> list[nn.Module]:
    """The transformer's blocks, by the names that transformers says not to split."""
    names = set(model._no_split_modules)
    return [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]
