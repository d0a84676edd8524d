"""Reports of the state of adapters, renaming and rescaling them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import assert_near, build, copy_adapter_to_peft, model_batch, peft_twin, snapshot

import pyadapt
from pyadapt import LoraConfig


def two(family="bert"):
    model = pyadapt.wrap(build(family), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False), "first")
    pyadapt.wrap(model, LoraConfig(target_modules=["key"], init_lora_weights=False), "second")
    return model.eval()


def peft_two():
    import peft

    twin = peft_twin(build("bert"), "first", task_type="SEQ_CLS")
    twin.add_adapter("second", peft.LoraConfig(target_modules=["key"]))
    return twin


def comparable(status):
    values = dataclasses.asdict(status)
    return {key: values[key] for key in ("enabled", "merged_adapters", "available_adapters", "quantization_backend")}


def test_the_model_as_peft_reports_it():
    model, twin = two(), peft_two()
    ours, theirs = model.get_model_status(), twin.get_model_status()
    assert comparable(ours) == comparable(theirs)
    assert ours.active_adapters == theirs.active_adapters == ["first"]
    assert ours.requires_grad == theirs.requires_grad == {"first": True, "second": False}
    assert ours.devices == theirs.devices
    assert ours.peft_types == theirs.peft_types
    assert ours.trainable_params == theirs.trainable_params
    assert ours.num_adapter_layers == theirs.num_adapter_layers
    assert ours.base_model_type == "BertForSequenceClassification"
    assert pyadapt.get_model_status(model) == ours


def test_each_layer_as_peft_reports_it():
    model, twin = two(), peft_two()
    theirs = {status.name.removeprefix("model."): status for status in twin.get_layer_status()}
    ours = {status.name: status for status in pyadapt.get_layer_status(model)}
    assert sorted(ours) == sorted(theirs)
    for name, status in ours.items():
        if name == "classifier":
            # peft makes a copy for the second adapter too, whose configuration does not name the head.
            assert (status.available_adapters, theirs[name].available_adapters) == (["first"], ["first", "second"])
            continue
        assert comparable(status) == comparable(theirs[name])
        # peft names the active adapters of the model at each layer, ours those that the layer has.
        assert status.active_adapters == [a for a in theirs[name].active_adapters if a in status.available_adapters]
        assert status.requires_grad == theirs[name].requires_grad
        assert status.devices == theirs[name].devices
    assert ours["bert.encoder.layer.0.attention.self.key"].module_type == "LinearUnit on Linear"
    assert ours["classifier"].module_type == "Linear on Linear"


def test_states():
    model = two()
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["first"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not model.get_model_status().enabled
    next(p for name, p in model.named_parameters() if name.endswith("first.lora_B")).requires_grad_(False)
    assert model.get_model_status().requires_grad["first"] == "irregular"
    quantised = pyadapt.wrap(pyadapt.quantize(build("llama")), LoraConfig())
    assert quantised.get_model_status().quantization_backend == "int8"


def test_not_a_wrapped_model():
    with pytest.raises(ValueError, match="carries no adapters"):
        pyadapt.get_model_status(build("bert"))


def test_rename():
    model = two()
    batch = model_batch("bert")
    with torch.no_grad():
        expected = model(**batch).logits
        model.rename_adapter("first", "renamed")
        assert list(model.peft_config) == ["renamed", "second"]
        assert model.active_adapters == ["renamed"]
        assert torch.equal(model(**batch).logits, expected)
    assert {n for name, p in model.named_parameters() if p.requires_grad for n in name.split(".")} >= {"renamed"}
    layer = model.bert.encoder.layer[0].attention.self.query
    assert list(layer.adapters) == ["renamed"]
    model.delete_adapter("renamed")
    assert model.active_adapters == ["second"]


def test_rename_keeps_files_and_place(tmp_path):
    model = two()
    model.set_adapter(["second", "first"])
    with torch.no_grad():
        expected = model(**model_batch("bert")).logits
    model.rename_adapter("second", "default")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "first" / "adapter_config.json").exists()
    with torch.no_grad():
        assert torch.equal(model(**model_batch("bert")).logits, expected)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("nobody", "x", "no adapter is called 'nobody'"),
        ("first", "second", "already"),
        ("first", "a.b", "without dots"),
    ],
)
def test_names_that_cannot_be(old, new, match):
    model = two()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        model.rename_adapter(old, new)
    assert snapshot(model) == before


def test_rescaling_as_peft_does():
    from peft.helpers import rescale_adapter_scale

    model = pyadapt.wrap(build("llama"), LoraConfig(init_lora_weights=False)).eval()
    twin = peft_twin(build("llama")).eval()
    copy_adapter_to_peft(model, twin)
    batch = model_batch("llama")
    with torch.no_grad():
        before = model(**batch).logits
        with pyadapt.rescale_adapter_scale(model, 0.3), rescale_adapter_scale(twin, 0.3):
            assert_near(model(**batch).logits, twin(**batch).logits, "model")
        assert torch.equal(model(**batch).logits, before)
        model.set_scale("default", 0.3)
        model.rescale(1 / 0.3)
        assert_near(model(**batch).logits, before, "model")


def test_rescaling_is_undone_after_an_error():
    model = two()
    unit = model.bert.encoder.layer[0].attention.self.query.adapters["first"]
    before = unit.scaling
    with pytest.raises(IndexError), model.rescaled(2.0, "first"):
        model(input_ids=torch.tensor([[1000]]))
    assert unit.scaling == before
    with model.rescaled(2.0, "first"):
        assert unit.scaling == 2 * before


def test_factors_that_cannot_be():
    model = two()
    with pytest.raises(TypeError, match="a number is needed"):
        model.rescale("twice")
    with pytest.raises(ValueError, match="no adapter is called 'nobody'"):
        model.rescale(2, "nobody")
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="first is merged"):
        model.rescale(2)
    with pytest.raises(RuntimeError, match="first is merged"), model.rescaled(2):
        pass
