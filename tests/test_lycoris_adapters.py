"""LoHa and LoKr adapters of linear layers: files, merging, several together, checkpointing and compiling."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from lycoris_cases import (
    BOTH_SPLIT,
    KHATRI_RAO,
    SPLIT,
    TILED,
    among,
    assert_gradients_are_those_of_peft,
    both,
    chosen,
    delta,
    every_form,
    every_shape,
    logits,
    main_forms,
    pair,
    small,
    trained,
    wrap,
)
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyadapt
from pyadapt import LoraConfig
from pyadapt.base import base_of


@pytest.fixture
def case(request, monkeypatch):
    return chosen(request, monkeypatch)


# --- files ------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("variant", ["plain", "more"])
def test_files_go_both_ways(case, variant, tmp_path):
    more = {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "modules_to_save": ["lm_head"]}
    model = wrap(case, **(more if variant == "more" else {}))
    model.save_pretrained(tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    assert_near(logits(twin), logits(model), "model")
    twin.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    ours, theirs = (json.loads((tmp_path / which / "adapter_config.json").read_text()) for which in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert torch.equal(logits(pyadapt.load(build("llama"), tmp_path / "theirs")), logits(model))


@both
def test_a_damaged_file(case, tmp_path):
    wrap(case).save_pretrained(tmp_path)
    tensors, damaged = load_file(tmp_path / "adapter_model.safetensors"), ("hada_w2_b", "lokr_w1")
    key = next(key for key in tensors if key.endswith(damaged))
    tensors[key] = tensors[key][:1].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(pyadapt.AdapterFileError, match=key.rpartition(".")[2]):
        pyadapt.load(model, tmp_path)
    assert snapshot(model) == before


@both
@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"r": 1}, True),
        ({"alpha": 1}, True),
        ({"r": 1, "alpha_pattern": {"q_proj": 9}}, True),
        ({"target_modules": ["q_proj"]}, True),
        ({"r": 8}, False),
    ],
    ids=str,
)
def test_hotswap(case, changes, fits, tmp_path):
    torch.manual_seed(8)
    other = wrap(case, **changes)
    other.save_pretrained(tmp_path)
    model = wrap(case).eval()
    model.set_scale("default", 0.5)
    assert model.hotswap_adapter(tmp_path) is fits
    assert_near(logits(model), logits(other), "model")


# --- merging ----------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_and_exactly_back(case, name, dtype):
    model = wrap(case, name, build(name, dtype=dtype))
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    before = logits(model, name)
    model.merge_adapter()
    assert_near(logits(model, name), before, "merged")
    model.unmerge_adapter()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    assert_near(logits(pyadapt.merge(model), name), before, "merged")


@every_shape
def test_the_merged_model_is_that_of_peft(case):
    model, twin = pair(case)
    ours, theirs = pyadapt.merge(model), twin.merge_and_unload()
    for key, value in theirs.state_dict().items():
        assert_near(ours.state_dict()[key], value, "merged")


def dequantised(model, name="llama"):
    """The dense model with the very values that quantised weights stand for."""
    dense = build(name)
    for path, layer in model.named_modules():
        kind = base_of(layer)
        if kind is not None and kind.quantized:
            with torch.no_grad():
                dense.get_submodule(path).weight.copy_(kind.matrix(layer))
    return dense


@main_forms
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_int8_base_trains_and_merges(case, name):
    """peft fails at this merge; over the weights that int8 stands for, it is the oracle."""
    quantised = pyadapt.quantize(build(name))
    model, twin = pair(case, name, quantised, dequantised(quantised, name))
    assert_gradients_are_those_of_peft(model, twin, name)
    before, kept = logits(model.eval(), name), {key: v.clone() for key, v in model.state_dict().items()}
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert_near(logits(pyadapt.merge(model), name), before, "merged")


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt")
@both
@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}], ids=str)
def test_bitsandbytes_base_trains_and_merges(case, how, tmp_path, monkeypatch):
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    build("llama").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**how)
    quantised = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    model, twin = pair(case, model=quantised, base=dequantised(quantised))
    layer, theirs = (m.layers[0].self_attn.q_proj for m in (model.model, twin.base_model.model.model))
    x = torch.randn(4, 24)
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for name, parameter in layer.unit("default").named_parameters():
        assert_near(parameter.grad, getattr(theirs, name)["default"].grad, "gradient")
    W = layer.base.matrix(layer).double() + delta(layer)
    assert_near(pyadapt.merge(model).model.layers[0].self_attn.q_proj.weight, W.float(), "merged")


# --- several adapters -------------------------------------------------------------------------


@main_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_adapters_with_scales_are_those_of_peft(case, dtype):
    model, twin = pair(case, model=build("llama", dtype=dtype))
    extra = case.options("llama", r=8 if case is SPLIT else 2, target_modules=["v_proj", "up_proj"])
    model.add_adapter("extra", case.ours(**extra))
    twin.add_adapter("extra", case.theirs(**extra))
    copy_adapter_to_peft(model, twin, "extra")
    model.set_adapter(["default", "extra"])
    twin.base_model.set_adapter(["default", "extra"])
    assert_gradients_are_those_of_peft(model, twin, dtype=dtype)
    model.set_scale("extra", 0.25)
    for module in twin.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("extra", 0.25)
    assert_near(logits(model), logits(twin), "model")
    together = logits(model)
    model.merge_adapter()
    assert_near(logits(model), together, "merged")


@main_forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_beside_a_lora_and_a_trained_bias(case, dtype):
    model = nn.Sequential(nn.Linear(9, 6)).to(dtype)
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, bias="lora_only"), "lora")
    model.add_adapter("other", case.config(r=1))
    with torch.no_grad():
        model[0].bias_of_lora.normal_()
    lora = model[0].unit("lora")
    for names in (["lora", "other"], ["other", "lora"]):
        model.set_adapter(names)
        x = torch.randn(5, 9, dtype=dtype)
        W = model[0].weight + lora.scaling * lora.lora_B @ lora.lora_A + delta(model[0], "other").to(dtype)
        assert_near(model(x), x @ W.t() + model[0].bias_of_lora, "layer" if dtype == torch.float64 else "merged")
        model.zero_grad()
        model(x).sum().backward()
        assert_near(model[0].bias_of_lora.grad, torch.full((6,), 5.0, dtype=dtype), "gradient")


@both
def test_no_weighted_sum(case):
    model = wrap(case)
    model.add_adapter("extra", case.config("llama"))
    before = snapshot(model)
    message = r"a weighted sum of METHOD adapters is no METHOD: .* set_adapter\(\[\.\.\.\]\)"
    with pytest.raises(ValueError, match=message.replace("METHOD", case.method)):
        model.add_weighted_adapter(["default", "extra"], [0.5, 0.5], "sum")
    assert snapshot(model) == before


@both
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_row_its_adapter(case, name):
    """Of another form, and of another method."""
    model = wrap(case, name).eval()
    model.add_adapter("other", case.config(name, r=8))
    model.add_adapter("lora", LoraConfig(target_modules=list(FAMILIES[name].targets), init_lora_weights=False))
    names = ["other", "__base__", "default", "lora", "other"]
    batch = model_batch(name, rows=len(names))
    del batch["labels"]
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        for i, adapter in enumerate(names):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            if adapter == "__base__":
                with model.disable_adapter():
                    expected = model(**row).logits
            else:
                model.set_adapter(adapter)
                expected = model(**row).logits
            assert_near(mixed[i : i + 1], expected, "model")


@both
def test_a_mixed_batch_trains_each_adapter_through_its_rows(case):
    model = wrap(case).train()
    model.add_adapter("other", case.config("llama", r=1))
    model.requires_grad_(False)
    names = ["other", "default"]
    for adapter in names:
        model.set_requires_grad(adapter)
    batch = model_batch("llama")
    unit = {name: model.model.layers[0].self_attn.q_proj.unit(name) for name in names}
    model(input_ids=batch["input_ids"], adapter_names=names).logits.square().sum().backward()
    found = {name: [p.grad.clone() for p in unit[name].parameters()] for name in names}
    for i, adapter in enumerate(names):
        model.set_adapter(adapter)
        model.zero_grad()
        model(input_ids=batch["input_ids"][i : i + 1]).logits.square().sum().backward()
        for gradient, parameter in zip(found[adapter], unit[adapter].parameters(), strict=True):
            assert_near(gradient, parameter.grad, "gradient")


# --- checkpointing and compiling --------------------------------------------------------------


@among([KHATRI_RAO, TILED, SPLIT, BOTH_SPLIT])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_dropout(case, reentrant):
    def gradients(checkpointing):
        torch.manual_seed(5)
        model = wrap(case, rank_dropout=0.3, module_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(6)
        model(**model_batch("llama")).loss.backward()
        return {name: p.grad for name, p in trained(model).items()}

    plain, again = gradients(False), gradients(True)
    assert any(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        assert_near(again[name], gradient, "gradient")


def assert_compiles(model, x):
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for which in (compiled.train(), eager.train()):
        torch.manual_seed(1)
        which(x).square().sum().backward()
    expected = {name: p.grad for name, p in trained(eager).items()}
    assert expected
    for name, parameter in trained(model).items():
        assert_near(parameter.grad, expected[name], "gradient")
    with torch.no_grad():
        assert_near(compiled.eval()(x), eager.eval()(x), "layer")


@every_form
def test_a_layer_compiles_in_one_piece(case):
    """A whole model: `test_methods.py`."""
    assert_compiles(small(case, (24, 36)), torch.randn(5, 36))


@main_forms
@pytest.mark.parametrize("base", ["Conv1D", "int8"])
def test_compiles_with_dropout_and_beside_another(case, base):
    model = nn.Sequential(Conv1D(24, 36) if base == "Conv1D" else nn.Linear(36, 24))
    model = pyadapt.quantize(model) if base == "int8" else model
    pyadapt.wrap(model, case.config(rank_dropout=0.4, module_dropout=0.2))
    model.add_adapter("other", case.config(r=1))
    model.set_adapter(["default", "other"])
    assert_compiles(model, torch.randn(5, 36))
