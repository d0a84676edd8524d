"""LLaMA-Adapter in training: recomputed, in mixed precision, compiled, over narrow and quantised bases, beside LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from adaption_prompt_cases import (
    DECODERS,
    LENGTH,
    add_by_definition,
    batch_of,
    build,
    gates,
    logits,
    open_gates,
    step,
    wrapped,
)
from models import assert_near

import pyadapt
from pyadapt import AdaptionPromptConfig, LoraConfig
from pyadapt.base import base_of

SOME = ["LlamaForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM", "T5ForConditionalGeneration"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    model, batch = wrapped(build(name)).train(), batch_of(name)
    # sdpa chooses its kernel by what needs gradients.
    model.enable_input_require_grads()
    loss, found = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again, gradients = step(model, batch)
    # Not bit for bit: the cross-attention of a frozen T5 rounds otherwise, too, where it fills no cache.
    assert_near(again, loss, "loss")
    assert found.keys() == gradients.keys()
    for key in found:
        assert_near(gradients[key], found[key], "gradient")


@pytest.mark.parametrize("name", SOME)
def test_autocast(name):
    model, batch = wrapped(build(name)).train(), batch_of(name)
    exact, gradients = step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = step(model, batch)
    assert_near(loss, exact, "loss", torch.bfloat16)
    assert found.keys() == gradients.keys()
    assert all(found[key].dtype == torch.float32 and bool(found[key].any()) for key in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SOME, "GPTJForCausalLM"])
def test_compiled_whole(name):
    model, batch = wrapped(build(name)).train(), batch_of(name)
    eager = copy.deepcopy(model)
    if name == "GPT2LMHeadModel":
        # Its loss says on the way that it is the default one, which is no part of a graph.
        for each in (model, eager):
            each.loss_type = "ForCausalLM"
    expected_loss, expected = step(eager, batch)
    loss, found = step(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    assert_near(loss, expected_loss, "loss")
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert_near(found[key], gradient, "gradient")


@pytest.mark.parametrize("name", SOME)
def test_a_base_in_bf16(name):
    narrow = build(name, torch.bfloat16)
    wide = wrapped(copy.deepcopy(narrow).double())
    model = wrapped(narrow)
    pyadapt.set_peft_model_state_dict(wide, pyadapt.get_peft_model_state_dict(model))
    assert all(parameter.dtype == torch.float32 for _, parameter in gates(model))
    _, found = step(model, batch_of(name))
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert_near(logits(model, batch_of(name)), logits(wide, batch_of(name)), "model", torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in SOME if name != "BloomForCausalLM"])
def test_an_int8_base_gives_what_its_dequantised_twin_gives(name):
    base = pyadapt.quantize(build(name))
    twin = copy.deepcopy(base)
    for layer in twin.modules():
        kind = base_of(layer)
        if kind is not None and kind.quantized:
            kind.make_dense(layer, kind.matrix(layer))
    model, twin = wrapped(base), wrapped(twin)
    pyadapt.set_peft_model_state_dict(twin, pyadapt.get_peft_model_state_dict(model))
    assert_near(logits(model, batch_of(name)), logits(twin, batch_of(name)), "model")
    _, found = step(model.train(), batch_of(name))
    assert all(bool(gradient.any()) for gradient in found.values())


def test_a_bitsandbytes_base(tmp_path, monkeypatch):
    from transformers import BitsAndBytesConfig

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    plain = build("LlamaForCausalLM")
    plain.save_pretrained(tmp_path)
    base = type(plain).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).eval()
    batch = batch_of("LlamaForCausalLM")
    before = logits(base, batch)
    model = wrapped(base, gate=None)
    assert torch.equal(logits(model, batch), before)
    open_gates(model, 1.3)
    assert not torch.equal(logits(model, batch), before)
    _, found = step(model.train(), batch)
    assert len(found) == 4
    assert all(bool(gradient.any()) for gradient in found.values())


def test_beside_lora_the_prompt_is_projected_by_the_adapted_layers():
    """Both at work: the definition, over a model whose projections have LoRA's terms."""
    name = "LlamaForCausalLM"
    plain = build(name, torch.float64)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = pyadapt.wrap(plain, lora, "lora")
    twin = copy.deepcopy(model)
    model.add_adapter("default", AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=2))
    open_gates(model, 0.7)
    model.set_adapter(["lora", "default"])
    units = {path: model.get_submodule(path).adapters["default"] for path in map(DECODERS[name].format, (0, 1))}
    add_by_definition(twin, {path: (unit.prompt, unit.gate) for path, unit in units.items()})
    assert_near(logits(model, batch_of(name)), logits(twin, batch_of(name)), "model")
    _, found = step(model, batch_of(name))
    assert len(found) == 4 + 2 * 3 * 2
