"""What `wrap` does where accelerate has said which engine will shard the model."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from models import build

import pyadapt
from pyadapt.base.int8 import Int8
from pyadapt.distributed import launched

LORA = {"peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def fsdp(monkeypatch):
    """Accelerate's state as it is once an Accelerator was made for FSDP."""

    def said(version, **settings):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=version, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False, **settings
        )
        state = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin, "_mixed_precision": "no"}
        monkeypatch.setattr(launched, "accelerator_state", lambda: state)
        return plugin

    return said


@pytest.fixture
def zero3(monkeypatch):
    """Accelerate's state as it is once an Accelerator was made for ZeRO-3."""

    class Plugin:
        zero_stage = 3
        deepspeed_config = {"bf16": {"enabled": False}}  # noqa: RUF012

    state = {"distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugins": {"default": Plugin()}}
    monkeypatch.setattr(launched, "accelerator_state", lambda: state)
    return Plugin


def test_fsdp1_gets_what_is_trained_as_units(fsdp):
    plugin = fsdp(1, use_orig_params=False)
    model = pyadapt.wrap(build("llama"), {**LORA, "modules_to_save": ["lm_head"]})
    is_unit = plugin.auto_wrap_policy
    units = {path for path, module in model.named_modules() if is_unit(module, recurse=False, nonwrapped_numel=0)}
    assert {"model.layers.0", "model.layers.0.self_attn.q_proj.adapters.default", "lm_head.copies.default"} <= units
    assert "model.layers.0.self_attn.q_proj" not in units
    other = build("llama")
    assert [path for path, module in other.named_modules() if is_unit(module, recurse=False, nonwrapped_numel=0)] == [
        "model.layers.0",
        "model.layers.1",
    ]


def test_fsdp1_sees_int8_as_the_models_dtype(fsdp, caplog):
    fsdp(1)
    model = pyadapt.quantize(build("llama", dtype=torch.bfloat16))
    with caplog.at_level(logging.INFO, "pyadapt"):
        pyadapt.wrap(model, LORA)
    layer = model.model.layers[0].self_attn.q_proj
    assert {part.dtype for part in Int8.stored(layer).values()} == {torch.bfloat16}
    assert "held as torch.bfloat16" in caplog.text


def test_a_setting_that_no_policy_mends_is_refused(fsdp):
    fsdp(1, use_orig_params=False)
    model = build("bert")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="fsdp_use_orig_params: true"):
        pyadapt.wrap(model, {"peft_type": "LORA", "task_type": "SEQ_CLS", "bias": "lora_only"})
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_fsdp2_gets_one_module_for_one_table(fsdp):
    fsdp(2)
    model = pyadapt.wrap(build("t5"), {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM"})
    assert model.encoder.embed_tokens is model.shared
    assert model.decoder.embed_tokens is model.shared


def test_bitsandbytes_is_converted_for_zero3(zero3, caplog, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build("llama").save_pretrained(tmp_path)
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    with caplog.at_level(logging.INFO, "pyadapt"):
        pyadapt.wrap(model, LORA)
    assert model.model.layers[0].self_attn.q_proj.base is Int8
    assert "from bitsandbytes' without loss" in caplog.text


def test_deepspeed_is_not_given_two_dtypes(zero3):
    config = {**LORA, "modules_to_save": ["lm_head"]}
    with pytest.raises(ValueError, match="mixed_precision: bf16"):
        pyadapt.wrap(build("llama", dtype=torch.bfloat16), config)
    pyadapt.wrap(build("llama", dtype=torch.bfloat16), {**config, "adapter_dtype": "base"})
    zero3.deepspeed_config = {"bf16": {"enabled": True}}
    pyadapt.wrap(build("llama", dtype=torch.bfloat16), config)
