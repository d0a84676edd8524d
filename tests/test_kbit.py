"""prepare_model_for_kbit_training: the effects are those of peft's, on quantised and on dense models."""

from __future__ import annotations

import copy
import logging
import warnings

import peft
import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_key, peft_twin, snapshot
from torch import nn
from transformers import BitsAndBytesConfig

import pyadapt
from pyadapt import LoraConfig
from pyadapt.kbit import prepare_model_for_int8_training, prepare_model_for_kbit_training

OPTIONS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "as_bf16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def model_of(tmp_path_factory):
    """A function of family and kind: the model in bf16."""

    def load(name, how):
        dense = build(name, dtype=torch.bfloat16)
        if how == "dense":
            return dense
        if how == "pyadapt":
            return pyadapt.quantize(dense)
        folder = tmp_path_factory.mktemp(name)
        dense.save_pretrained(folder)
        config = BitsAndBytesConfig(**OPTIONS[how])
        return type(dense).from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16).eval()

    return load


def state(model):
    return {
        "parameters": {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()},
        "checkpointing": {n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)},
        "hooks": {n: len(m._forward_hooks) for n, m in model.named_modules()},
    }


def theirs(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
        return peft.prepare_model_for_kbit_training(model, *args, **kwargs)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("how", [*OPTIONS, "dense"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_as_in_peft(name, how, recompute, kwargs, model_of):
    model, twin = model_of(name, how), model_of(name, how)
    assert prepare_model_for_kbit_training(model, recompute, kwargs) is model
    theirs(twin, recompute, kwargs)
    assert state(model) == state(twin)
    # Compared as bytes: values of 4 bits seen as bf16 may be NaN.
    assert snapshot(model)["values"] == snapshot(twin)["values"]
    assert (how != "dense" and recompute) == bool(state(model)["checkpointing"])


def test_tied_parameters_stay_tied(model_of):
    model = prepare_model_for_kbit_training(model_of("t5", "int8"))
    assert model.lm_head.weight is model.shared.weight
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}])
@pytest.mark.parametrize("when", ["before wrap", "after wrap"])
@pytest.mark.parametrize("how", [*OPTIONS, "pyadapt"])
def test_training_and_merging_afterwards(how, when, kwargs, model_of):
    model, batch = model_of("llama", how), model_batch("llama")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    if when == "before wrap":
        pyadapt.wrap(prepare_model_for_kbit_training(model, True, kwargs), config)
    else:
        prepare_model_for_kbit_training(pyadapt.wrap(model, config), True, kwargs)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".adapters." in name
    }
    model.train()(**batch).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    plain = copy.deepcopy(model)
    plain.activation_checkpointing_disable()
    plain.zero_grad()
    plain(**batch).loss.backward()
    for name, gradient in gradients.items():
        assert_near(gradient, plain.get_parameter(name).grad, "gradient")
    # Everything is fp32 now, and so is what a merge makes dense.
    with torch.no_grad():
        expected = plain.eval()(**batch).logits
        merged = pyadapt.merge(plain)
        assert {p.dtype for p in merged.parameters()} == {torch.float32}
        # The packed bf16 values of W are exact in the kernels and in the merged weight alike.
        assert_near(merged(**batch).logits, expected, "merged")


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_losses_are_those_of_peft(how, model_of):
    config = {"r": 4, "target_modules": list(FAMILIES["llama"].targets), "init_lora_weights": False}
    model = pyadapt.wrap(prepare_model_for_kbit_training(model_of("llama", how)), LoraConfig(**config)).train()
    twin = peft_twin(theirs(model_of("llama", how), True, {"use_reentrant": True}), **config).train()
    copy_adapter_to_peft(model, twin)
    batch = model_batch("llama")
    ours, other = model(**batch), twin(**batch)
    ours.loss.backward()
    other.loss.backward()
    parameters = dict(twin.named_parameters())
    # bitsandbytes computes 4-bit layers in fp32 here from a weight that was never rounded to bf16.
    dtype = torch.float32 if how == "int8" else torch.bfloat16
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_near(parameter.grad, parameters[peft_key(name)].grad, "gradient", dtype)


def test_a_trained_module_goes_to_fp32(model_of):
    model = pyadapt.wrap(model_of("llama", "int8"), LoraConfig(modules_to_save=["lm_head"]))
    prepare_model_for_kbit_training(model)
    copied = model.lm_head.copies["default"].weight
    assert copied.dtype == torch.float32
    assert copied.requires_grad
    assert not model.lm_head.weight.requires_grad


def test_a_module_that_cannot_recompute_is_refused():
    model = pyadapt.quantize(nn.Sequential(nn.Linear(4, 4)), skip=[])
    before = snapshot(model)
    with pytest.raises(ValueError, match="use_gradient_checkpointing=False"):
        prepare_model_for_kbit_training(model)
    assert snapshot(model) == before
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def test_the_older_name():
    assert prepare_model_for_int8_training is prepare_model_for_kbit_training
