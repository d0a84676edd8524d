"""Llama-70B with LoRA on every linear layer, on many GPUs: computed from the formulas, nothing measured."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

import pyadapt

from . import formulas
from .formulas import Weight

SIZES: dict[str, Any] = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
RANK = 16
RANKS = (8, 64, 512)
ENGINES = ("ddp", "fsdp2", "fsdp1", "zero3")

# Assumed, not measured: a GPU of 80 GB whose bf16 products run at 400 TFLOP/s; GPUs of one machine exchange 300 GB/s,
# machines 50 GB/s a GPU (one 400 Gbit/s port each).
GPU_MEMORY = 80e9
GPU_FLOPS = 400e12
WITHIN_MACHINE, BETWEEN_MACHINES, GPUS_IN_MACHINE = 300e9, 50e9, 8
TOKENS = 4096


@dataclass
class Row:
    """One engine on so many GPUs."""

    engine: str
    base: str
    ranks: int
    memory: formulas.Memory
    activations: int
    traffic: formulas.Traffic

    @property
    def total(self) -> int:
        """Bytes on a GPU, activations under checkpointing included."""
        return self.memory.total + self.activations

    @property
    def sent(self) -> float:
        """Bytes that a GPU sends a step."""
        return self.traffic.sent(self.ranks)


def meta_llama() -> Any:
    """The model without values, with its adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = model.to(torch.bfloat16).requires_grad_(False)
    options = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "target_modules": "all-linear"}
    return pyadapt.wrap(model, options)


def quantized(weights: list[Weight]) -> list[Weight]:
    """The same with int8 matrices in the blocks, and a 4-byte scale a row."""
    found = []
    for weight in weights:
        if weight.trained or weight.group < 0 or len(weight.shape) != 2:
            found.append(copy.copy(weight))
        else:
            found += [replace(weight, itemsize=1), replace(weight, shape=weight.shape[:1], itemsize=4)]
    return found


def step_seconds(tokens: int, checkpointing: bool = True) -> float:
    """Seconds of the products of one step on one GPU.

    2 operations a value and token forward, as many for dx, and with checkpointing the forward again; frozen weights
    have no gradient of their own.
    """
    values = formulas.total(weight for weight in inventory("bf16") if not weight.trained) / 2
    return (6 if checkpointing else 4) * values * tokens / GPU_FLOPS


def inventory(base: str) -> list[Weight]:
    """The parameters over a bf16 or an int8 base."""
    weights = formulas.inventory(meta_llama())
    return quantized(weights) if base == "int8" else weights


def rows(tokens: int = TOKENS) -> list[Row]:
    """Every engine, base and number of GPUs."""
    found = []
    for base in ("bf16", "int8"):
        weights = inventory(base)
        for engine in ENGINES:
            for ranks in RANKS:
                memory = formulas.memory(engine, weights, ranks)
                kept = checkpointed_activations(tokens)
                found.append(Row(engine, base, ranks, memory, kept, formulas.traffic(engine, weights, ranks)))
    return found


def checkpointed_activations(tokens: int) -> int:
    """Bytes with checkpointing in bf16: each block's input, what the block at work keeps, and fp32 logits twice."""
    hidden, layers, heads = SIZES["hidden_size"], SIZES["num_hidden_layers"], SIZES["num_attention_heads"]
    kv = hidden * SIZES["num_key_value_heads"] // heads
    block = formulas.llama_block_activations(hidden, SIZES["intermediate_size"], kv, heads, RANK, itemsize=2)
    return tokens * (2 * hidden * layers + block + 2 * 4 * SIZES["vocab_size"])
