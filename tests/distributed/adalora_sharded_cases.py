"""AdaLoRA under an engine, step by step beside a single process. Run on the ranks of a gang."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch
from engines import Options, Runner, rows_of_rank, start
from models import FAMILIES, build, model_batch
from tolerance import assert_close, assert_near
from torch import Tensor

import pyadapt

STEPS, SAVED_AT = 6, 3
# The schedule ends within them: ranks fall from step 2 on, and the last allocation is at step 5.
SCHEDULE = {"init_r": 4, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 3, "deltaT": 1, "beta2": 0.7}
CONFIG = {**SCHEDULE, "peft_type": "ADALORA", "lora_alpha": 9, "init_lora_weights": False, "orth_reg_weight": 0.3}

# Name of a case -> (family, further configuration, options of the training).
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "clipped": ("llama", {}, {"accumulate": 2, "clip": 0.05}),
    "reentrant": ("llama", {}, {"checkpointing": "reentrant"}),
    "non-reentrant": ("llama", {}, {"checkpointing": "non-reentrant", "accumulate": 2}),
    "offloaded": (
        "llama",
        {},
        {
            "clip": 0.05,
            "zero3": {
                "zero_optimization": {
                    "stage": 3,
                    "stage3_param_persistence_threshold": 0,
                    "offload_optimizer": {"device": "cpu"},
                    "offload_param": {"device": "cpu"},
                }
            },
        },
    ),
    "no penalty": ("gpt2", {"orth_reg_weight": 0.0}, {}),
}


def wrapped(name: str, **config: Any) -> Any:
    """The model of a case."""
    family, own, _ = CASES[name]
    model = build(family)
    torch.manual_seed(5)
    return pyadapt.wrap(model, {"task_type": FAMILIES[family].task, **CONFIG, **own, **config})


def train(
    model: Any, engine: str | None, name: str, twice: bool = False
) -> tuple[list[float], list[Any], dict[str, Tensor]]:
    """The losses of all steps, what was kept of the ranks after each, and what was seen before the last allocation.

    Args:
        model: of the case.
        engine: or None for this process alone.
        name: of the case.
        twice: whether the model is called for each half of the rows, with one backward for both.
    """
    family, _, how = CASES[name]
    options = Options(**how)
    model.train()
    if options.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": options.checkpointing == "reentrant"})
        model.enable_input_require_grads()
    runner = start(model, engine, options)
    losses, kept, seen = [], [], {}
    for step in range(STEPS):
        loss = 0.0
        for micro in range(options.accumulate):
            batch = model_batch(family, seed=step * options.accumulate + micro, rows=4)
            inputs = batch if engine is None else rows_of_rank(batch)
            loss += (_twice if twice else Runner.micro_step)(runner, inputs, micro == options.accumulate - 1)
        if runner.engine is not None:
            # It zeroes the gradients as well: this is the order of accelerate's `backward`.
            runner.engine.step()
        else:
            if options.clip is not None:
                runner._clip(options.clip)
            runner.optimizer.step()
        model.update_and_allocate(step + 1)
        if runner.engine is None:
            runner.optimizer.zero_grad()
        losses.append(loss / options.accumulate)
        units = model.units_of("default")
        kept.append([unit.kept.tolist() for unit in units])
        if step + 1 == SCHEDULE["total_step"] - SCHEDULE["tfinal"] - 1:
            seen = {
                f"{i}.{key}": buffer.clone()
                for i, unit in enumerate(units)
                for key, buffer in unit.named_buffers()
                if buffer.is_floating_point()
            }
    return losses, kept, seen


def _twice(runner: Runner, inputs: dict[str, Tensor], last: bool) -> float:
    class Both:
        def __init__(self, call: Any) -> None:
            self.call = call

        def __call__(self, **inputs: Tensor) -> Any:
            halves = [{key: value[half::2] for key, value in inputs.items()} for half in range(2)]
            first, second = (self.call(**half) for half in halves)
            second.loss = (first.loss + second.loss) / 2
            return second

    call, runner.call = runner.call, Both(runner.call)
    loss = runner.micro_step(inputs, last)
    runner.call = call
    return loss


def compare(engine: str, name: str, twice: bool = False) -> None:
    """Losses, ranks kept, what was seen of the gradients and the final adapter are those of a single process."""
    alone, shared = wrapped(name), wrapped(name)
    losses, kept, seen = train(alone, None, name)
    shared_losses, shared_kept, shared_seen = train(shared, engine, name, twice)
    assert_near(torch.tensor(shared_losses), torch.tensor(losses), "loss", torch.float32)
    assert shared_kept == kept
    assert sum(map(sum, kept[-1])) < sum(map(len, kept[-1])), "no rank was taken away: the comparison is an empty one"
    for key, value in seen.items():
        assert_close(shared_seen[key], value, "gradient", torch.float32, key)
    ours, theirs = shared.get_adapter_state_dict(), alone.get_adapter_state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert_close(ours[key], value, "gradient", torch.float32, key)


def compare_all(engine: str, names: list[str]) -> dict[str, str]:
    """Several cases, and what went wrong with which."""
    wrong = {}
    for name in names:
        try:
            compare(engine, name)
        except Exception:
            wrong[name] = traceback.format_exc(limit=-6)
    return wrong


TOO_LATE = "no parameter of adapter 'default' has a gradient"


def errors_too_late(engine: str) -> str:
    """What is said where gradients have been zeroed; the beginning of it."""
    model = wrapped("plain")
    runner = start(model.train(), engine, Options())
    runner.micro_step(rows_of_rank(model_batch("llama", rows=4)), True)
    runner.optimizer.zero_grad()
    try:
        model.update_and_allocate(1)
    except RuntimeError as error:
        return str(error).partition(":")[0]
    return "nothing"


def by_trainer(engine: str, folder: str, resume: bool = False) -> tuple[list[float], list[Any], dict[str, Any]]:
    """transformers' Trainer with `AdaLoraCallback`: losses, ranks kept at the end, and the adapter.

    Args:
        engine: as in `trainer_cases.run`; the gang is run without a process group.
        folder: for what Trainer writes: a checkpoint in the midst of the schedule.
        resume: go on from that, with an adapter that starts otherwise.
    """
    from trainer_cases import Rows, training_arguments
    from transformers import Trainer

    options = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 0.1, "save_steps": SAVED_AT}
    arguments = training_arguments(engine, folder, **options)
    torch.manual_seed(6 if resume else 5)
    model = pyadapt.wrap(build("bert"), {"task_type": "SEQ_CLS", **CONFIG})
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[pyadapt.AdaLoraCallback()])
    trainer.train(resume_from_checkpoint=os.path.join(folder, f"checkpoint-{SAVED_AT}") if resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    kept = [unit.kept.tolist() for unit in model.units_of("default")]
    return losses, kept, {key: value.detach().numpy() for key, value in model.get_adapter_state_dict().items()}
