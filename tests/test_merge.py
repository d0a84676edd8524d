"""Folding adapters into the weights: in place and back, or for good."""

from __future__ import annotations

import pytest
import torch
from models import (
    ALL,
    FAMILIES,
    assert_near,
    build,
    copy_adapter_to_peft,
    model_batch,
    peft_twin,
    plain_module,
    snapshot,
)
from torch import nn

import pyadapt
from pyadapt import LoraConfig

# Kind of base -> dtype that decides how exact a merged model is.
BASES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def wrapped(name, base="fp32", targets=None, quantised=False):
    model = build(name, dtype=BASES[base])
    if quantised:
        pyadapt.quantize(model)
    config = {"target_modules": targets, "task_type": FAMILIES[name].task, "init_lora_weights": False, "r": 4}
    pyadapt.wrap(model, LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.3)
    return model


def logits(model, name):
    batch = model_batch(name)
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].to(
            next(p for p in model.parameters() if p.is_floating_point()).dtype
        )
    return model(**batch).logits.detach()


def base_values(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_bits(after, before):
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_in_place_and_exactly_back(name, base):
    model = wrapped(name, base, targets="all-linear")
    before, expected = base_values(model), logits(model, name)
    model.merge_adapter()
    assert model.adapter_state.merged == ("default",)
    assert_near(logits(model, name), expected, "merged")
    assert any(not torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.unmerge_adapter()
    assert_equal_bits(base_values(model), before)
    assert torch.equal(logits(model, name), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_place_over_int8(name):
    model = wrapped(name, quantised=True)
    before, expected = base_values(model), logits(model, name)
    model.merge_adapter()
    weights = {p.dtype for n, p in model.named_parameters() if n.endswith(FAMILIES[name].targets[0] + ".weight")}
    assert weights == {torch.int8}
    error = (logits(model, name) - expected).norm() / expected.norm()
    # Quantised once more: each weight is off by at most half a step of 1/127 of its row's peak.
    assert error < 0.02
    model.unmerge_adapter()
    assert_equal_bits(base_values(model), before)


@pytest.mark.parametrize("name", ALL)
def test_merged_model_equals_that_of_peft(name):
    model = wrapped(name)
    twin = peft_twin(build(name), target_modules=list(FAMILIES[name].targets), task_type=FAMILIES[name].task, r=4)
    copy_adapter_to_peft(model, twin)
    merged, theirs = pyadapt.merge(model), twin.merge_and_unload()
    assert type(merged) is type(theirs)
    for (key, ours), (other, value) in zip(merged.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert key == other
        assert_near(ours, value, "merged")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("base", ["fp32", "bf16", "int8"])
def test_merge_gives_the_plain_model(name, base):
    model = wrapped(name, "fp32" if base == "int8" else base, quantised=base == "int8")
    plain = build(name, dtype=torch.bfloat16 if base == "bf16" else torch.float32)
    expected = logits(model, name)
    flags = {n: p.requires_grad for n, p in plain.named_parameters()}
    merged = pyadapt.merge(model)
    assert merged is model
    assert {path: type(m) for path, m in merged.named_modules()} == {path: type(m) for path, m in plain.named_modules()}
    assert {path: sorted(vars(m)) for path, m in merged.named_modules() if path} == {
        path: sorted(vars(m)) for path, m in plain.named_modules() if path
    }
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert {p.dtype for p in merged.parameters()} == {p.dtype for p in plain.parameters()}
    assert not hasattr(merged.config, "quantization_config")
    assert not getattr(merged, "is_quantized", False)
    assert not hasattr(merged, "peft_config")
    if base != "int8":
        assert {n: p.requires_grad for n, p in merged.named_parameters()} == flags
    assert_near(logits(merged, name), expected, "merged")


def test_merge_in_fp64():
    model = wrapped("llama", "fp64", targets="all-linear")
    expected = logits(model, "llama")
    assert_near(logits(pyadapt.merge(model), "llama"), expected, "merged")


def test_two_adapters_at_once():
    model = wrapped("llama")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False))
    model.set_adapter(["default", "second"])
    expected, before = logits(model, "llama"), base_values(model)
    model.merge_adapter()
    assert_near(logits(model, "llama"), expected, "merged")
    model.unmerge_adapter()
    assert_equal_bits(base_values(model), before)
    model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert_equal_bits(base_values(model), before)
    assert_near(logits(pyadapt.merge(model), "llama"), expected, "merged")


def test_one_named_adapter():
    model = wrapped("llama")
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False))
    model.set_adapter("second")
    expected = logits(model, "llama")
    model.set_adapter("default")
    assert_near(logits(model.merge_and_unload(adapter_names=["second"], safe_merge=True), "llama"), expected, "merged")


def test_order_of_calls_is_guarded():
    model = wrapped("llama")
    with pytest.raises(RuntimeError, match="nothing to unmerge"):
        model.unmerge_adapter()
    model.merge_adapter()
    before = snapshot(model)
    for attempt in (
        model.merge_adapter,
        lambda: model.set_adapter("default"),
        lambda: model.delete_adapter("default"),
        lambda: model.add_adapter("x", LoraConfig()),
        model.disable_adapters,
    ):
        with pytest.raises(RuntimeError, match="default is merged; unmerge_adapter"):
            attempt()
    assert snapshot(model) == before
    assert model.active_adapters == ["default"]


def test_merged_and_disabled_for_a_block():
    model = wrapped("llama")
    plain = logits(build("llama"), "llama")
    model.merge_adapter()
    merged = logits(model, "llama")
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), plain)
    assert torch.equal(logits(model, "llama"), merged)


def test_merged_then_unloaded_gives_the_base():
    model = wrapped("llama")
    model.merge_adapter()
    assert torch.equal(logits(pyadapt.unwrap(model), "llama"), logits(build("llama"), "llama"))


def test_merged_then_merged_for_good():
    model = wrapped("llama")
    expected = logits(model, "llama")
    model.merge_adapter()
    assert_near(logits(pyadapt.merge(model), "llama"), expected, "merged")


def test_saving_while_merged_writes_the_same_adapter(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path / "a")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_bad_weight_is_refused_and_nothing_changes(value, quantised, tmp_path):
    model = wrapped("llama", quantised=quantised)
    with torch.no_grad():
        # The last layer, so that all others have been looked at before.
        model.model.layers[1].self_attn.v_proj.adapters["default"].lora_B[3, 1] = value
    before = snapshot(model)
    for attempt in (model.merge_adapter, lambda: pyadapt.merge(model), lambda: pyadapt.export(model, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_proj"):
            attempt()
        assert snapshot(model) == before
    assert pyadapt.is_wrapped(model)
    assert not (tmp_path / "out").exists()


def test_overflow_of_a_16_bit_weight_is_refused():
    model = wrapped("llama").to(torch.float16)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.adapters["default"].lora_A.fill_(300)
        layer.adapters["default"].lora_B.fill_(300)
    before = snapshot(model)
    with pytest.raises(ValueError, match="float16"):
        model.merge_adapter()
    assert snapshot(model) == before


def test_modules_to_save_are_merged():
    model = wrapped("bert")
    with torch.no_grad():
        model.classifier.copies["default"].bias.add_(3)
    head = {key: value.clone() for key, value in model.classifier.copies["default"].state_dict().items()}
    expected = logits(model, "bert")
    merged = pyadapt.merge(model)
    assert type(merged.classifier) is nn.Linear
    assert_equal_bits(merged.classifier.state_dict(), head)
    assert_near(logits(merged, "bert"), expected, "merged")


def test_modules_to_save_answer_while_merged():
    model = wrapped("bert")
    with torch.no_grad():
        model.classifier.copies["default"].bias.add_(3)
    expected = logits(model, "bert")
    model.merge_adapter()
    assert_near(logits(model, "bert"), expected, "merged")


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_trained_head_that_is_tied_to_the_embedding(name, tmp_path):
    """Merging must not write the trained head into the embedding that shares its storage."""
    model = build(name)
    config = LoraConfig(
        target_modules=list(FAMILIES[name].targets), modules_to_save=["lm_head"], init_lora_weights=False
    )
    pyadapt.wrap(model, config)
    with torch.no_grad():
        model.lm_head.copies["default"].weight.add_(torch.randn(67, 24))
    expected, embedding = logits(model, name), model.get_input_embeddings().weight.clone()
    merged = pyadapt.merge(model)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert_near(logits(merged, name), expected, "merged")
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert_near(logits(again, name), expected, "merged")


def test_plain_module():
    model = plain_module()
    pyadapt.wrap(
        model, LoraConfig(target_modules="all-linear", modules_to_save=["classifier"], init_lora_weights=False)
    )
    x = torch.randn(4, 7)
    expected = model(x)
    merged = pyadapt.merge(model)
    assert type(merged.encoder[0]) is nn.Linear
    assert_near(merged(x), expected, "merged")


def test_not_wrapped():
    with pytest.raises(ValueError, match="cannot merge: this LlamaForCausalLM carries no adapters"):
        pyadapt.merge(build("llama"))
