"""A bias of B (`lora_bias`): y = x W' + b + s (x A' B' + b_B)."""

from __future__ import annotations

import peft
import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_twin, plain_module, snapshot
from peft_gradients import assert_gradients_equal
from torch import nn

import pyadapt
from pyadapt import LoraConfig
from pyadapt.files import AdapterFileError

# peft takes the bias of B for a matrix that a sharding engine has left empty, and says so each time it saves one.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*LoRA tensor\(s\) have invalid shape")


def pair(model, **config):
    config = {"lora_bias": True, "init_lora_weights": False, "r": 4, "lora_alpha": 10, **config}
    twin = peft_twin(model, **config)
    pyadapt.wrap(model, LoraConfig(**config))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("lora_bias"):
                parameter.normal_(std=0.1)
    copy_adapter_to_peft(model, twin)
    return model, twin


def family_pair(name, **config):
    return pair(build(name), task_type=FAMILIES[name].task, target_modules=list(FAMILIES[name].targets), **config)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_step_as_in_peft(name, use_rslora):
    model, twin = family_pair(name, use_rslora=use_rslora)
    batch = model_batch(name)
    ours, theirs = model(**batch), twin(**batch)
    assert_near(ours.logits, theirs.logits, "model")
    ours.loss.backward()
    theirs.loss.backward()
    assert_gradients_equal(model, twin)


def test_a_layer_without_a_bias_of_its_own():
    """It serves; only merging has no place for it. peft warns when it wraps such a layer."""
    model = plain_module()
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        model, twin = pair(model, target_modules=["2"])
    x = torch.randn(3, 7)
    assert_near(model(x), twin(x), "model")


def test_it_starts_at_zero():
    model = plain_module()
    expected = model(torch.ones(2, 7))
    pyadapt.wrap(model, LoraConfig(lora_bias=True, target_modules=["0"]))
    assert torch.equal(model.encoder[0].adapters["default"].lora_bias, torch.zeros(11))
    assert_near(model(torch.ones(2, 7)), expected, "model")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_several_adapters(name):
    # Without a task, as peft's second adapter would save the head of the first.
    model, twin = pair(build(name), target_modules=list(FAMILIES[name].targets))
    options = {"r": 2, "init_lora_weights": False, "lora_bias": True, "target_modules": list(FAMILIES[name].targets)}
    model.add_adapter("second", LoraConfig(**options))
    twin.add_adapter("second", peft.LoraConfig(**options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("second.lora_bias"):
                parameter.normal_(std=0.1)
    copy_adapter_to_peft(model, twin, "second")
    model.set_adapter(["default", "second"])
    twin.base_model.set_adapter(["default", "second"])
    batch = model_batch(name)
    expected = twin(**batch).logits
    assert_near(model(**batch).logits, expected, "model")
    assert_near(pyadapt.merge(model)(**batch).logits, expected, "merged")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("quantised", [False, True])
def test_merging_takes_the_scaling(name, quantised, tmp_path):
    """Against fp64: b + s b_B. (formats.md: older versions of peft lose s here.)"""
    model = build(name)
    if quantised:
        pyadapt.quantize(model)
    pyadapt.wrap(model, LoraConfig(lora_bias=True, lora_alpha=20, task_type=FAMILIES[name].task))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("lora_bias", "lora_B")):
                parameter.normal_(std=0.1)
    batch = model_batch(name)
    path = next(key for key, layer in model.named_modules() if hasattr(layer, "adapters"))
    layer = model.get_submodule(path)
    unit = layer.adapters["default"]
    exact = layer.bias.double() + unit.scaling * unit.lora_bias.double()
    expected, before = model(**batch).logits, snapshot(model)["values"]
    model.merge_adapter()
    assert_near(layer.bias, exact, "merged", torch.float32)
    model.unmerge_adapter()
    assert snapshot(model)["values"] == before
    pyadapt.export(model, tmp_path)
    assert_near(type(build(name)).from_pretrained(tmp_path).eval()(**batch).logits, expected, "merged")
    assert_near(pyadapt.merge(model)(**batch).logits, expected, "merged")
    assert_near(model.get_submodule(path).bias, exact, "merged", torch.float32)


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "pissa", "lora_dropout": 0.2}])
def test_compiled_with_another_scaling(options):
    """The scaling then becomes a number that the graph takes as an input, used in the kernel and beside it."""
    model = plain_module()
    pyadapt.wrap(model, LoraConfig(lora_bias=True, target_modules=["0"], r=3, **options)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 7)
    for factor in (1.0, 1.25, 1.5):
        model.rescale(factor)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert_near(compiled(x), expected, "model")


def test_merging_without_a_bias_to_merge_into_is_refused(tmp_path):
    model = plain_module()
    pyadapt.wrap(model, LoraConfig(lora_bias=True, target_modules=["0", "2"]))
    before = snapshot(model)
    for attempt in (model.merge_adapter, lambda: pyadapt.merge(model), lambda: pyadapt.export(model, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"encoder\.2 cannot be merged: lora_bias=True has trained a bias"):
            attempt()
        assert snapshot(model) == before
    assert not (tmp_path / "out").exists()
    assert model.encoder[0](torch.ones(1, 7)).shape == (1, 11)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_files_both_ways(name, tmp_path):
    model, twin = family_pair(name)
    batch = model_batch(name)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "ours" / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
    assert torch.equal(pyadapt.load(build(name), tmp_path / "theirs")(**batch).logits, expected)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours")
    assert_near(theirs(**batch).logits, expected, "model")


def test_a_file_without_it_is_refused(tmp_path):
    model = plain_module()
    pyadapt.wrap(model, LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_bias": false', '"lora_bias": true'))
    with pytest.raises(AdapterFileError, match=r"missing:   base_model\.model\.encoder\.0\.lora_B\.bias \(11,\)"):
        pyadapt.load(plain_module(), tmp_path)


def test_embeddings_have_none():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"0 \(Embedding\): lora_bias: B of an embedding has no bias"):
        pyadapt.wrap(model, LoraConfig(lora_bias=True, target_modules=["0", "1"]))


def test_the_plan_counts_it():
    plan = pyadapt.plan(plain_module(), LoraConfig(lora_bias=True, target_modules=["0"], r=2))
    assert plan.layers[0].shapes["lora_B.bias"] == (11,)
    assert plan.trainable_parameters == 2 * 7 + 11 * 2 + 11
