"""Models that `deepspeed.zero.Init` makes in parts, wrapped and trained. Run on the ranks of a gang."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from engines import ZERO3, Options, train
from methods_cases import CASES, LORA, global_batch
from models import FAMILIES, build, model_batch
from tolerance import assert_close, assert_near
from zero3_cases import collect

import pyadapt

# Starts that read the model's own weights, and what else is made of them when wrapping: name -> (family, config).
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {**LORA, "init_lora_weights": "pissa"}),
    "pissa-fast": ("llama", {**LORA, "init_lora_weights": "pissa_niter_4"}),
    "olora-gpt2": ("gpt2", {**LORA, "init_lora_weights": "olora"}),
    "loftq-4": ("llama", {**LORA, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}),
    "loftq-8": ("llama", {**LORA, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 2}}),
    "eva": ("llama", {**LORA, "init_lora_weights": "eva"}),
    "dora-embedding": ("llama", {**LORA, "use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "bias-all": ("bert", {**LORA, "bias": "all"}),
    "t5-head": ("t5", {**LORA, "target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    "vit": ("vit", {**LORA, "target_modules": ["q_proj", "projection"]}),
}
EVERY = {**CASES, **STARTS}


def partitioned(model: Any) -> Any:
    """`model` as `deepspeed.zero.Init` makes one."""
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo")
    deepspeed.zero.Init(module=model, config_dict_or_path=ZERO3)
    return model


def made_in_parts(names: Iterable[str], base: str = "fp32") -> dict[str, str]:
    """Wrapping a model in parts against wrapping a whole one: plan, counts, first values, training, final adapter."""

    def check(name: str) -> None:
        family, config = EVERY[name]
        config = {"task_type": FAMILIES[family].task, **config}
        data = [model_batch(family, seed=i, rows=16) for i in range(3)] if name == "eva" else None
        made, plans = [], []
        for make in (lambda model: model, partitioned):
            model = make(build(family, dtype=torch.bfloat16 if base == "bf16" else torch.float32))
            if base == "int8":
                pyadapt.quantize(model)
            torch.manual_seed(3)
            plans.append(pyadapt.plan(model, config).as_dict())
            made.append(pyadapt.wrap(model, config, data=data))
        alone, shared = made
        assert plans[0] == plans[1]
        assert alone.get_nb_trainable_parameters() == shared.get_nb_trainable_parameters()
        frozen = {key: parameter for key, parameter in shared.named_parameters() if not parameter.requires_grad}
        assert all(parameter.numel() == 0 for parameter in frozen.values())
        compare_adapters(shared, alone)

        def batch(step: int) -> dict[str, torch.Tensor]:
            return global_batch(name, step) if name in CASES else model_batch(family, seed=100 + step, rows=4)

        wanted = train(alone, None, batch, Options(steps=2))
        found = train(shared, "zero3", batch, Options(steps=2))
        dtype = torch.bfloat16 if base == "bf16" else torch.float32
        assert_near(torch.tensor(found), torch.tensor(wanted), "loss", dtype)
        ours = shared.get_adapter_state_dict()
        for key, value in alone.get_adapter_state_dict().items():
            assert_close(ours[key], value, "gradient", dtype, key)

    return collect(names, check)


def compare_adapters(shared: Any, alone: Any) -> None:
    """The adapters of two models are the same, bit for bit."""
    ours, theirs = shared.get_adapter_state_dict(), alone.get_adapter_state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def from_pretrained_in_parts(folder: str) -> dict[str, str]:
    """A model that transformers makes under a DeepSpeed configuration; quantised, wrapped, loaded into, unwrapped.

    Args:
        folder: `folder/model` holds a Llama, `folder/adapter` an adapter for it.
    """
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    where, adapter = os.path.join(folder, "model"), os.path.join(folder, "adapter")

    def check(name: str) -> None:
        kept = HfDeepSpeedConfig(ZERO3)
        model = transformers.LlamaForCausalLM.from_pretrained(where)
        del kept
        plain = transformers.LlamaForCausalLM.from_pretrained(where)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        if name == "int8":
            pyadapt.quantize(model)
            pyadapt.quantize(plain)
            held = sum(parameter.ds_tensor.numel() for parameter in model.parameters() if parameter.dtype == torch.int8)
            whole = sum(parameter.numel() for parameter in plain.parameters() if parameter.dtype == torch.int8)
            assert held == whole // dist.get_world_size()
        if name == "load":
            model, plain = pyadapt.load(model, adapter), pyadapt.load(plain, adapter)
            compare_adapters(model, plain)
            return
        classes = [type(module) for module in model.modules()]
        torch.manual_seed(3)
        model = pyadapt.wrap(model, LORA)
        torch.manual_seed(3)
        plain = pyadapt.wrap(plain, LORA)
        if name == "unwrap":
            pyadapt.unwrap(model)
            assert [type(module) for module in model.modules()] == classes
            return
        wanted = train(plain, None, lambda step: global_batch("lora", step), Options(steps=2))
        found = train(model, "zero3", lambda step: global_batch("lora", step), Options(steps=2))
        assert_near(torch.tensor(found), torch.tensor(wanted), "loss")

    return collect(["wrap", "int8", "load", "unwrap"], check)
