"""Each method under an engine: losses and final adapter of a single process. Run on the ranks of a gang."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterable
from typing import Any

import torch
from engines import Options, train
from models import FAMILIES, build, model_batch
from tolerance import assert_close, assert_near
from torch import Tensor

import pyadapt

# Name of a case -> (family, configuration). Nothing is dropped: ranks would draw other masks than one process does.
LORA = {"peft_type": "LORA", "r": 4, "init_lora_weights": False}
WEIGHT_SIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", LORA),
    "lora-t5": ("t5", LORA),
    "lora-gpt2": ("gpt2", LORA),
    "dora": ("llama", {**LORA, "use_dora": True}),
    "lora-saved": ("bert", {**LORA, "modules_to_save": ["classifier"]}),
    "lora-bias": ("bert", {**LORA, "bias": "lora_only"}),
    "lora-embedding": ("llama", {**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora-tokens": ("llama", {**LORA, "trainable_token_indices": [1, 2]}),
    "ia3": ("llama", {"peft_type": "IA3"}),
    "loha": ("llama", {"peft_type": "LOHA", "r": 4, "init_weights": False}),
    "lokr": ("llama", {"peft_type": "LOKR", "r": 4, "init_weights": False}),
}
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("llama", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}),
    "prefix-mlp": ("t5", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "prefix_projection": True}),
    "prompt": ("llama", {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}),
    "p-tuning": ("bert", {"peft_type": "P_TUNING", "num_virtual_tokens": 3}),
    "p-tuning-lstm": (
        "llama",
        {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM"},
    ),
    "multitask": ("t5", {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "num_tasks": 2}),
    "llama-adapter": ("llama", {"peft_type": "ADAPTION_PROMPT", "adapter_len": 3, "adapter_layers": 2}),
}
CASES = {**WEIGHT_SIDE, **PROMPTS}
# The product of a task's factors makes a hundredfold, in two steps of 0.1, of what bf16 rounds (one process in bf16 and
# in fp32 differ as much): in smaller steps it does not.
SMALL_STEPS = {"multitask": 1e-3}


def wrapped(name: str, base: str = "fp32", storage_dtype: torch.dtype | None = None) -> Any:
    """The model of a case, the same on every rank and in every process.

    Args:
        name: of the case.
        base: "fp32", "bf16" or "int8" (quantised from fp32).
        storage_dtype: what int8 values are held in, as in `pyadapt.quantize`.
    """
    family, config = CASES[name]
    model = build(family, dtype=torch.bfloat16 if base == "bf16" else torch.float32)
    if base == "int8":
        pyadapt.quantize(model, storage_dtype=storage_dtype)
    torch.manual_seed(3)
    return pyadapt.wrap(model, {"task_type": FAMILIES[family].task, **config})


def global_batch(name: str, step: int) -> dict[str, Tensor]:
    """The batch of all ranks together for one micro-step of a case."""
    family, config = CASES[name]
    batch = model_batch(family, seed=100 + step, rows=4)
    if config["peft_type"] == "MULTITASK_PROMPT_TUNING":
        batch["task_ids"] = torch.arange(4) % 2
    return batch


def compare(engine: str, name: str, base: str = "fp32", **options: Any) -> None:
    """Train a case under `engine` and alone; the losses of all steps and what is saved at the end have to be equal."""
    if name in SMALL_STEPS:
        options["optimizer"] = functools.partial(torch.optim.SGD, lr=SMALL_STEPS[name])
    # FSDP1 can flatten no integers.
    alone, shared = wrapped(name, base), wrapped(name, base, torch.float32 if engine.startswith("fsdp1") else None)
    wanted = train(alone, None, lambda step: global_batch(name, step), Options(**options))
    found = train(shared, engine, lambda step: global_batch(name, step), Options(**options))
    dtype = torch.bfloat16 if base == "bf16" or options.get("autocast") or options.get("mixed") else torch.float32
    assert_near(torch.tensor(found), torch.tensor(wanted), "loss", dtype)
    ours, theirs = shared.get_adapter_state_dict(), alone.get_adapter_state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert_close(ours[key], value, "gradient", dtype, key)


def compare_all(
    engine: str, names: Iterable[str], base: str = "fp32", given: dict[str, Any] | None = None, **options: Any
) -> dict[str, str]:
    """Several cases, and what went wrong with which; `given` are further options, for a gang passes none by name."""
    wrong = {}
    for name in names:
        try:
            compare(engine, name, base, **(given or {}), **options)
        except Exception:
            wrong[name] = traceback.format_exc(limit=-6)
    return wrong
