"""Training that is saved, and goes on in other processes and on other numbers of ranks. Run on the ranks of a gang."""

from __future__ import annotations

import glob
import os
import signal
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engines import Options, Runner, rows_of_rank, start
from methods_cases import LORA
from models import build, model_batch
from torch import Tensor

import pyadapt

# Where a checkpoint is written, and how many steps there are in all.
SAVED_AT, STEPS = 2, 4
CONFIG = {**LORA, "task_type": "SEQ_CLS", "bias": "lora_only", "modules_to_save": ["classifier"]}
# A unit of FSDP1 without use_orig_params is frozen or trained as a whole. Over DDP torch's `set_state_dict` looks for
# names of parameters, where a frozen bias beside a trained one has another in a state dict (see `biases`).
WITHOUT_BIASES = {"bias": "none"}

# Keys of DeepSpeed's configuration, where it is not that of ZeRO-3 in fp32.
ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    # The scale of the loss doubles in each step.
    "zero3_fp16": {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1}},
}

Result = tuple[list[float], dict[str, Any]]


def wrapped(seed: int = 3, **config: Any) -> Any:
    """A model whose adapter has units, a trained bias and a module that is trained whole; `seed` says its start."""
    model = build("bert")
    torch.manual_seed(seed)
    model = pyadapt.wrap(model, {**CONFIG, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def global_batch(step: int) -> dict[str, Tensor]:
    """The batch of all ranks together for one step."""
    return model_batch("bert", seed=100 + step, rows=4)


def run(engine: str, folder: str, first: int = 0, killed: bool = False) -> Result:
    """A plain loop from step `first`, before which it loads from `folder`, where it saves behind step SAVED_AT.

    With `killed`, the last rank ends by SIGKILL in the step behind that.

    Returns:
        The losses, and the adapter at the end.
    """
    # With another start, so that only the checkpoint can bring the right weights.
    model = wrapped(3 + first, **(WITHOUT_BIASES if engine == "ddp" else {}))
    options = Options(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), zero3=ZERO.get(engine, {}))
    if engine == "zero3_fp16":
        # DeepSpeed allows it on GPUs alone; torch has its products on CPUs as well.
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    runner = start(model, "zero3" if engine.startswith("zero") else engine, options)
    model.train()
    if first:
        load(runner, engine, folder)
    losses = []
    for step in range(first, STEPS):
        if killed and step == SAVED_AT and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        losses.append(runner.micro_step(rows_of_rank(global_batch(step)), True))
        runner.step()
        if step + 1 == SAVED_AT and not first:
            save(runner, engine, folder)
            dist.barrier()
    # As arrays: tensors would be shared memory, which ends with the process.
    left = {key: value.detach().numpy() for key, value in model.get_adapter_state_dict().items()}
    if engine == "zero3_fp16":
        left["the scale of the loss"] = np.array(float(runner.engine.optimizer.loss_scale), dtype=np.float32)
    return losses, left


def run_and_resume(engine: str, folder: str) -> tuple[Result, Result]:
    """The whole run, and its second half once more from the checkpoint, on as many ranks."""
    return run(engine, folder), run(engine, folder, SAVED_AT)


def save(runner: Runner, engine: str, folder: str) -> None:
    """As scripts do it that know their engine and nothing of adapters."""
    if engine.startswith("zero"):
        runner.engine.save_checkpoint(folder)
        return
    from torch.distributed.checkpoint import save as write
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(runner.call, runner.optimizer)
    write({"model": model, "optimizer": optimizer}, checkpoint_id=folder)


def load(runner: Runner, engine: str, folder: str) -> None:
    """The other way."""
    if engine.startswith("zero"):
        path, _ = runner.engine.load_checkpoint(folder)
        assert path is not None
        return
    from torch.distributed.checkpoint import load as read
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = get_state_dict(runner.call, runner.optimizer)
    state = {"model": model, "optimizer": optimizer}
    read(state, checkpoint_id=folder)
    set_state_dict(runner.call, runner.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def names_in(engine: str, folder: str) -> set[str]:
    """The model's names in a checkpoint."""
    if engine in ("zero0", "zero1", "zero2"):
        (path,) = glob.glob(f"{folder}/global_step*/mp_rank_00_model_states.pt")
        return set(torch.load(path, weights_only=False)["module"])
    if engine.startswith("zero3"):
        (path,) = glob.glob(f"{folder}/global_step*/*")
        state = torch.load(path, weights_only=True)
        assert state["optimizer"]["state"].keys() <= state["model"].keys()
        return set(state["model"])
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name.removeprefix("model.") for name in names if name.startswith("model.")}
