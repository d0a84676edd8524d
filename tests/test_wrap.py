"""wrap: the same object in place, with nothing of the user's model lost."""

from __future__ import annotations

import copy

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


@pytest.mark.parametrize("name", ALL)
def test_object_class_keys_and_values_stay(name):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = dict(model.named_modules())
    classes = {path: type(module) for path, module in objects.items()}
    wrapped = pyadapt.wrap(model, LoraConfig(task_type=FAMILIES[name].task))
    assert wrapped is model
    assert pyadapt.is_wrapped(model)
    for path, module in objects.items():
        assert model.get_submodule(path) is module
        assert isinstance(module, classes[path])
        assert type(module).__name__ == classes[path].__name__
        assert type(module).__qualname__ == classes[path].__qualname__
        assert type(module).__module__ == classes[path].__module__
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    extra = after.keys() - before.keys()
    assert extra
    assert all(".adapters.default." in key or key.startswith("classifier.copies.default.") for key in extra)


@pytest.mark.parametrize("name", ALL)
def test_fresh_adapter_changes_no_output(name):
    model, batch = build(name), model_batch(name)
    before = model(**batch).logits
    pyadapt.wrap(model, LoraConfig(task_type=FAMILIES[name].task))
    assert_near(model(**batch).logits, before, "layer")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("targets", ["left out", "all-linear"])
def test_forward_equals_peft(name, targets):
    model, batch = build(name), model_batch(name)
    family = FAMILIES[name]
    wanted = list(family.targets) if targets == "left out" else targets
    twin = peft_twin(model, r=4, lora_alpha=6, target_modules=wanted, task_type=family.task, init_lora_weights=False)
    ours = None if targets == "left out" else targets
    pyadapt.wrap(
        model, LoraConfig(r=4, lora_alpha=6, target_modules=ours, task_type=family.task, init_lora_weights=False)
    )
    base = model(**batch).logits
    copy_adapter_to_peft(model, twin)
    assert_near(model(**batch).logits, twin.eval()(**batch).logits, "model")
    with model.disable_adapter():
        assert not torch.allclose(model(**batch).logits, base)


def test_everything_but_the_adapter_is_frozen():
    model = build("bert")
    pyadapt.wrap(model, LoraConfig(task_type="SEQ_CLS"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".adapters.default." in n or ".copies.default." in n}


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_goes_over_to_the_adapter(training):
    model = build("llama").train(training)
    pyadapt.wrap(model, LoraConfig(modules_to_save=["lm_head"]))
    assert {module.training for module in model.modules()} == {training}


def test_unit_is_a_leaf_beside_the_weight():
    model = pyadapt.wrap(build("llama"), LoraConfig(r=3))
    layer = model.model.layers[0].self_attn.v_proj
    unit = layer.adapters["default"]
    assert {name: tuple(p.shape) for name, p in unit.named_parameters()} == {"lora_A": (3, 24), "lora_B": (12, 3)}
    assert not list(unit.children())
    assert type(layer).forward is not nn.Linear.forward


def test_adapter_weights_over_16_bits_are_fp32():
    model = pyadapt.wrap(build("llama", dtype=torch.bfloat16), LoraConfig())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    double = pyadapt.wrap(plain_module().double(), LoraConfig(target_modules=["0"]))
    assert {p.dtype for p in double.parameters() if p.requires_grad} == {torch.float64}


def test_initialisation():
    model = plain_module()
    model.encoder[0] = nn.Linear(512, 256)
    torch.manual_seed(1)
    pyadapt.wrap(model, LoraConfig(r=64, target_modules=["encoder.0"]))
    unit = model.encoder[0].adapters["default"]
    # Kaiming uniform with a = sqrt 5: uniform in +- 1 / sqrt(K).
    bound = 512**-0.5
    assert float(unit.lora_A.detach().abs().max()) <= bound
    assert float(unit.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not unit.lora_B.any()
    model.add_adapter("g", LoraConfig(r=64, target_modules=["encoder.0"], init_lora_weights="gaussian"))
    unit = model.encoder[0].adapters["g"]
    assert float(unit.lora_A.detach().std()) == pytest.approx(1 / 64, rel=0.02)
    assert not unit.lora_B.any()


def test_modules_to_save_train_a_copy_and_leave_the_module():
    model = build("llama")
    head = model.lm_head
    before = head.weight.clone()
    pyadapt.wrap(model, LoraConfig(modules_to_save=["lm_head"]))
    assert model.lm_head is head
    copied = head.copies["default"]
    assert type(copied) is nn.Linear
    assert copied.weight.requires_grad
    assert not head.weight.requires_grad
    model(**model_batch("llama")).loss.backward()
    assert copied.weight.grad is not None
    assert head.weight.grad is None
    with torch.no_grad():
        copied.weight.add_(1)
    batch = model_batch("llama")
    on = model(**batch).logits
    with model.disable_adapter():
        off = model(**batch).logits
    assert not torch.allclose(on, off)
    assert torch.equal(head.weight, before)


def test_unwrap_gives_the_model_back():
    model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    before = snapshot(model)
    batch = model_batch("bert")
    logits = model(**batch).logits
    pyadapt.wrap(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False))
    assert not torch.allclose(model(**batch).logits, logits)
    assert pyadapt.unwrap(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(**batch).logits, logits)
    assert not pyadapt.is_wrapped(model)


def test_wrap_again_after_unwrap():
    model = build("llama")
    first = pyadapt.unwrap(pyadapt.wrap(model, LoraConfig()))
    second = pyadapt.wrap(first, LoraConfig(target_modules="all-linear"))
    assert second is model
    model.save_pretrained  # noqa: B018 - still there
    assert list(model.peft_config) == ["default"]


def test_config_is_not_changed_by_wrap():
    config = LoraConfig(task_type="SEQ_CLS", rank_pattern={"query": 2})
    before = copy.deepcopy(vars(config))
    model = pyadapt.wrap(build("bert"), config)
    assert vars(config) == before
    assert model.peft_config["default"].target_modules == ["query", "value"]
    # The same configuration fits another architecture afterwards.
    assert pyadapt.plan(build("t5"), LoraConfig()).config.target_modules == ["q", "v"]


def test_wrapping_a_wrapped_model_adds_an_adapter():
    model = pyadapt.wrap(build("llama"), LoraConfig())
    cls = type(model)
    assert pyadapt.wrap(model, LoraConfig(r=2), "second") is model
    assert type(model) is cls
    assert list(model.peft_config) == ["default", "second"]
    assert model.active_adapters == ["default"]


def test_plain_module():
    model = plain_module()
    x = torch.randn(4, 7)
    before = model(x)
    assert pyadapt.wrap(model, LoraConfig(target_modules=["encoder.2"], modules_to_save=["classifier"])) is model
    assert_near(model(x), before, "layer")
    assert type(model).__name__ == "PlainNet"


def test_the_root_may_be_nothing_but_a_container():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["0", "2"]))
    assert model(torch.randn(6, 5)).shape == (6, 3)
    assert len(model) == 3
    assert isinstance(model[0], nn.Linear)


def test_a_layer_used_twice_gets_one_adapter():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    pyadapt.wrap(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert len([name for name in model.state_dict() if "lora_A" in name]) in (1, 2)
    assert len([p for p in model.parameters() if p.requires_grad]) == 2
    model(torch.randn(2, 4)).sum().backward()
    assert model[0].adapters["default"].lora_A.grad is not None


def test_generate_still_works():
    model = pyadapt.wrap(build("llama"), LoraConfig(init_lora_weights=False))
    ids = model_batch("llama")["input_ids"]
    twin = peft_twin(build("llama"), target_modules=["q_proj", "v_proj"])
    copy_adapter_to_peft(model, twin)
    ours = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    theirs = twin.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, theirs)
