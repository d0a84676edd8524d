"""Tiny mixtures of experts, whose experts lie in one parameter of three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from tolerance import assert_near
from torch import nn

import pyadapt
from pyadapt import LoraConfig
from pyadapt.layer import adapted_layers

from .compare import copy_adapter_to_peft, peft_twin

VOCABULARY = 67


def _options(**more: Any) -> dict[str, Any]:
    # Rows of a multiple of 16 bytes: torch's grouped_mm takes no others.
    return {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_options()))


def _gpt_oss() -> nn.Module:
    """Experts stored as (E, in, out), with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**_options(sliding_window=8)))


def _qwen3_moe() -> nn.Module:
    """The first layer is dense."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    options = _options(num_experts=4, moe_intermediate_size=40, mlp_only_layers=[0])
    options.pop("num_local_experts")
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options))


def _llama4() -> nn.Module:
    """Each expert sees every token; there is one way to run them."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    options = _options(num_experts_per_tok=1, intermediate_size_mlp=36, attention_chunk_size=16, use_qk_norm=False)
    return Llama4ForCausalLM(Llama4TextConfig(**options))


MIXTURES = {"mixtral": _mixtral, "gpt_oss": _gpt_oss, "qwen3_moe": _qwen3_moe, "llama4": _llama4}

# Model -> the ways to run its experts.
IMPLEMENTATIONS = [
    (name, implementation)
    for name in MIXTURES
    for implementation in (("eager",) if name == "llama4" else ("eager", "batched_mm", "grouped_mm"))
]

# The experts of every one of them, by suffix.
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny mixture in evaluation mode, its weights from a fixed seed."""
    torch.manual_seed(0)
    model: Any = MIXTURES[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Some classes leave parameters at zero, or empty.
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1))
    if name != "llama4":
        model.set_experts_implementation(implementation)
    return model.to(dtype)


def token_batch(rows: int = 2, tokens: int = 6) -> dict[str, torch.Tensor]:
    """Token ids that are their own labels."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def logits(model: Any) -> torch.Tensor:
    """What `model` makes of `token_batch`."""
    return model(input_ids=token_batch()["input_ids"]).logits.detach()


OPTIONS = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
RANDOM = {**OPTIONS, "init_lora_weights": False}


def pair(
    name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, Any]:
    """Our wrapped mixture and peft's with the same adapter, both in training mode."""
    options = {**RANDOM, **options}
    plain = mixture(name, implementation, dtype)
    twin = peft_twin(plain, **options)
    model = pyadapt.wrap(plain, LoraConfig(**options))
    copy_adapter_to_peft(model, twin)
    return model.train(), twin.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """File key -> gradient of our adapter."""
    found = {}
    for path, layer in adapted_layers(model):
        for attribute, parameter in layer.unit("default").named_parameters():
            found[f"base_model.model.{path}.{layer.unit('default').file_keys[attribute]}"] = parameter.grad
    return found


def gradients_of_peft(twin: Any) -> dict[str, torch.Tensor]:
    """File key -> gradient of peft's adapter."""
    return {name.replace(".default", ""): p.grad for name, p in twin.named_parameters() if ".lora_" in name}


def step(model: Any) -> torch.Tensor:
    """Logits of one forward and backward."""
    output = model(**token_batch())
    output.loss.backward()
    return output.logits.detach()


def assert_same_step(model: Any, twin: Any, dtype: torch.dtype = torch.float32) -> None:
    """The logits and the gradients of A and B of one training step are the same."""
    assert_near(step(model), step(twin), "model", dtype)
    ours, theirs = gradients(model), gradients_of_peft(twin)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert bool(gradient.any()), key
        assert_near(ours[key], gradient, "gradient", dtype)
