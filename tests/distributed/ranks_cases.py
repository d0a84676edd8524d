"""Ranks that do not do the same: each function runs on the ranks of a gang and gives the error that its rank saw."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from engines import Options, start
from models import build, model_batch
from torch import nn

import pyadapt
from pyadapt.distributed import agreement

LORA = {"peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM"}


def error_of(function: Any, *args: Any) -> str:
    """The error of a call, or "none"."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def several(folder: str) -> dict[str, str]:
    """The error that this rank sees in each case; a group that has failed once has to go on to the next."""
    rank = dist.get_rank()
    found = {}
    found["another rank of LoRA"] = error_of(pyadapt.wrap, build("llama"), {**LORA, "r": 4 + rank})
    found["other targets"] = error_of(
        pyadapt.wrap, build("llama"), {**LORA, "target_modules": ["q_proj"] if rank else ["q_proj", "v_proj"]}
    )
    found["another model"] = error_of(pyadapt.wrap, build("gpt2" if rank else "llama"), LORA)
    wrong = {**LORA, "target_modules": ["nothing"]} if rank else LORA
    found["a rank that fails"] = error_of(pyadapt.wrap, build("llama"), wrong)
    found["the same"] = error_of(pyadapt.wrap, build("llama"), LORA)

    os.environ["PYADAPT_RANK_TIMEOUT"] = "1"
    if rank == 0:
        found["a rank that is missing"] = error_of(pyadapt.wrap, build("llama"), LORA)
    dist.barrier()
    # The meeting that rank 1 has missed: it is late for good, and only its own error says so.
    if rank == 1:
        found["a rank that is missing"] = error_of(pyadapt.wrap, build("llama"), LORA)
    dist.barrier()

    os.environ["PYADAPT_CHECK_RANKS"] = "0"
    models = [pyadapt.wrap(build("llama"), {**LORA, "r": 4 + rank}), pyadapt.wrap(build("llama"), LORA)]
    del os.environ["PYADAPT_CHECK_RANKS"]
    del os.environ["PYADAPT_RANK_TIMEOUT"]
    found["trained otherwise"] = error_of(models[0].train)
    found["trained alike"] = error_of(models[1].train)
    return found


def wrapping_too_late(engine: str) -> dict[str, str]:
    """Wrapping, and adding an adapter, once an engine has the model in hand."""
    plain: Any = build("llama")
    runner = start(plain, engine, Options()) if engine != "zero3" else None
    if runner is None:
        import deepspeed
        from engines import ZERO3

        deepspeed.init_distributed("gloo")
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        runner = deepspeed.initialize(model=plain, optimizer=optimizer, config=ZERO3)[0]
    before = {name: type(module) for name, module in plain.named_modules()}
    outside = runner if isinstance(runner, nn.Module) else runner.call
    found = {"outside": error_of(pyadapt.wrap, outside, LORA)}
    if engine != "ddp":
        # DDP leaves no trace on the model inside.
        found["inside"] = error_of(pyadapt.wrap, plain, LORA)
    assert {name: type(module) for name, module in plain.named_modules()} == before
    wrapped = pyadapt.wrap(build("llama"), LORA)
    handed = start(wrapped, engine, Options())
    found["another adapter"] = error_of(wrapped.add_adapter, "other", pyadapt.LoraConfig(r=2))
    handed.call(**model_batch("llama", rows=2))
    return found


def saving_on_one_rank(engine: str, folder: str) -> dict[str, str]:
    """Only rank 0 saves a sharded model: it says which rank it waits for, and nothing was written."""
    os.environ["PYADAPT_RANK_TIMEOUT"] = "1"
    model = pyadapt.wrap(build("llama"), LORA)
    start(model, engine, Options())
    found = {}
    if dist.get_rank() == 0:
        found["alone"] = error_of(model.save_pretrained, folder)
        found["partial"] = error_of(lambda: model.save_pretrained(folder, state_dict={}))
        found["written"] = str(os.path.exists(os.path.join(folder, "adapter_model.safetensors")))
    dist.barrier()
    return found


def failing_together() -> dict[str, str]:
    """A block that fails on one rank fails on all, and the ranks meet again after it."""

    def block(fails: bool) -> None:
        with agreement.together("writing"):
            if fails:
                raise OSError("the disk is full")

    found = {"one": error_of(block, dist.get_rank() == 1)}
    found["none"] = error_of(block, False)
    return found
