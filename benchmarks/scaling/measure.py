"""Training a small Llama under an engine, recorded: what each rank holds and sends. Runs on every rank."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyadapt

from . import formulas
from .engines import Plan, start
from .recorder import Recorder, Stage

# Sizes that 4 ranks share evenly, and whose matrices are large beside two tokens' activations.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 8, "target_modules": "all-linear", "init_lora_weights": False},
    "dora": {"peft_type": "LORA", "r": 8, "target_modules": "all-linear", "init_lora_weights": False, "use_dora": True},
    "ia3": {"peft_type": "IA3"},
    "loha": {"peft_type": "LOHA", "r": 8, "target_modules": ["q_proj", "v_proj"]},
    "lokr": {"peft_type": "LOKR", "r": 8, "target_modules": ["q_proj", "v_proj"]},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8},
}


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        plan: the engine.
        base: "fp32", "bf16" or "int8".
        method: one of `METHODS`, or "full": every parameter is trained.
        tokens: of the one row of a batch.
        checkpointing: None, "reentrant" or "non-reentrant".
    """

    plan: Plan
    base: str = "fp32"
    method: str = "lora"
    tokens: int = 2
    checkpointing: str | None = None


@dataclass
class Measured:
    """Of one rank, in bytes; see `formulas.Memory`.

    Attributes:
        at_start: tensors alive when the engine has taken the model.
        gradients: what the first backward leaves behind.
        optimizer: what the first optimizer step leaves behind.
        activations: what forward leaves behind for backward, of the last step.
        total: the most at once, in forward and backward of the last step.
        traffic: of the last step.
        weights: what the model holds.
    """

    at_start: int
    gradients: int
    optimizer: int
    activations: int
    total: int
    traffic: formulas.Traffic
    weights: list[formulas.Weight]


def small_llama(**sizes: int) -> Any:
    """A random Llama of `SIZES`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    given: dict[str, Any] = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4, **sizes}
    return LlamaForCausalLM(LlamaConfig(**given, pad_token_id=0, use_cache=False))


def prepared(model: nn.Module, case: Case) -> Any:
    """The model with the base and the adapters of a case."""
    if case.method == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if case.base == "bf16":
        model.to(torch.bfloat16)
    if case.base == "int8":
        # FSDP1 flattens one dtype, which has to be a floating one.
        pyadapt.quantize(model, storage_dtype=torch.float32 if case.plan.engine == "fsdp1" else None)
    return pyadapt.wrap(model, {"task_type": "CAUSAL_LM", **METHODS[case.method]})


def measure(case: Case, steps: int = 2, **sizes: int) -> Measured:
    """Train a few steps and tell what was there; the process group is `recorder.start_group`'s."""
    # Made before, or a group's own tensors would count.
    dist.barrier()
    recorder = Recorder()
    with recorder.recording():
        model = prepared(small_llama(**sizes), case)
        model.train()
        if case.checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
            model.enable_input_require_grads()
        weights = formulas.inventory(model)
        handle = start(model, case.plan)
        recorder.mark("started")
        inputs = batch(case.tokens)
        recorder.mark("ready")
        for _ in range(steps):
            handle.step(inputs, recorder.mark)
    if handle.engine is not None:
        handle.engine.destroy()
    del model, handle
    gc.collect()
    return _read(recorder.stages, weights)


def activations(case: Case) -> int:
    """Bytes that the blocks of `SIZES` keep for backward, as the formula says: without checkpointing, with LoRA."""
    heads, kv_heads, r = 8, 4, METHODS["lora"]["r"]
    hidden, inner, layers = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_hidden_layers"]
    itemsize = 2 if case.base == "bf16" else 4
    block = formulas.llama_block_activations(hidden, inner, hidden * kv_heads // heads, heads, r, itemsize)
    return case.tokens * layers * block


def batch(tokens: int) -> dict[str, Tensor]:
    """One row."""
    ids = torch.arange(tokens)[None] + 1
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def _read(stages: list[Stage], weights: list[formulas.Weight]) -> Measured:
    named = [stage.name for stage in stages]
    started, ready = stages[0], stages[1]
    backward, step = (stages[named.index(name)] for name in ("backward", "step"))
    ends = [number for number, name in enumerate(named) if name == "end"]
    between, last = stages[ends[-2]], stages[ends[-2] + 1 :]
    traffic = formulas.Traffic()
    for stage in last if dist.get_world_size() > 1 else []:
        for kind, size in stage.traffic.items():
            # Losses, norms and engines' own notes are a few kB; they are not what a network is built for.
            if size > 8192:
                traffic.add(kind, size, stage.calls[kind])
    first_forward = next(stage for stage in last if stage.name == "forward")
    return Measured(
        at_start=started.live,
        gradients=backward.live - ready.live,
        optimizer=step.live - backward.live,
        activations=first_forward.live - between.live,
        total=max(stage.peak for stage in last if stage.name in ("forward", "backward")),
        traffic=traffic,
        weights=weights,
    )


def block_activations(case: Case) -> float:
    """Bytes a token that one block keeps: by difference, so that what lies outside blocks does not count."""
    from .recorder import start_group

    start_group()
    kept = {
        (layers, tokens): measure(replace(case, tokens=tokens), num_hidden_layers=layers).activations
        for layers in (2, 4)
        for tokens in (32, 64)
    }
    of_two_blocks = {tokens: kept[4, tokens] - kept[2, tokens] for tokens in (32, 64)}
    return (of_two_blocks[64] - of_two_blocks[32]) / 2 / 32


def measure_all(cases: list[Case]) -> list[Measured]:
    """Several cases on one rank, DeepSpeed's last; the process group is made first."""
    from .recorder import start_group

    with contextlib.suppress(ValueError):
        start_group()
    return [measure(case) for case in cases]
