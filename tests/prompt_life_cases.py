"""Every method that learns a prompt, on a decoder, an encoder-decoder and an encoder, for the tests of its life."""

from __future__ import annotations

from typing import Any

import torch
from models import FAMILIES, build, model_batch
from torch import Tensor

import pyadapt
from pyadapt.config import as_config

TOKENS = 3
METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"peft_type": "PREFIX_TUNING"},
    "prefix MLP": {"peft_type": "PREFIX_TUNING", "prefix_projection": True, "encoder_hidden_size": 7},
    "P-tuning": {"peft_type": "P_TUNING", "encoder_hidden_size": 8},
    "P-tuning LSTM": {
        "peft_type": "P_TUNING",
        "encoder_hidden_size": 8,
        "encoder_reparameterization_type": "LSTM",
    },
    "prompt": {"peft_type": "PROMPT_TUNING"},
    "multitask": {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2},
    "llama-adapter": {"peft_type": "ADAPTION_PROMPT", "adapter_layers": 2},
}
# Methods of PEFT's prompt learning: all but LLaMA-Adapter, which is a tuner of layers there.
PROMPTS = [name for name in METHODS if name != "llama-adapter"]
# Those whose prompt is made by something, which is not in a file.
MADE = ["prefix MLP", "P-tuning", "P-tuning LSTM"]
CASES = [
    (method, family)
    for method in METHODS
    for family in ("llama", "gpt2", "t5", "bert")
    if (method, family) != ("llama-adapter", "bert")
]
CALLS = {"multitask": {"task_ids": torch.tensor([0, 1])}}


def config_of(method: str, family: str = "llama", **options: Any) -> Any:
    """A configuration of the method for the family's task."""
    length = "adapter_len" if method == "llama-adapter" else "num_virtual_tokens"
    return as_config({**METHODS[method], length: TOKENS, "task_type": FAMILIES[family].task, **options})


def batch_of(method: str, family: str = "llama", **options: Any) -> dict[str, Tensor]:
    """Inputs and labels, and what the method asks for besides."""
    return {**model_batch(family, **options), **CALLS.get(method, {})}


def wrapped(method: str, family: str = "llama", seed: int = 0, base: Any = None, **options: Any) -> Any:
    """A wrapped tiny model whose adapter does something."""
    torch.manual_seed(seed)
    model = pyadapt.wrap(build(family) if base is None else base, config_of(method, family, **options))
    return stir(model, "default", seed)


def stir(model: Any, name: str = "default", seed: int = 0) -> Any:
    """The model with the weights of one adapter moved, those that start at or close to zero as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." in f".{key}" or f".copies.{name}." in key:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits; what calls of the base model do not know is left out while adapters are disabled."""
    asked = getattr(getattr(model, "adapter_state", None), "arguments", ())
    known = {key: value for key, value in batch.items() if key != "task_ids" or key in asked}
    with torch.no_grad():
        return model(**known).logits


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients, by name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained(model: Any) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
