"""Several adapters on one model: add, switch, sum, disable, delete, take off."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_twin, snapshot

import pyadapt
from pyadapt import LoraConfig

SECOND = {"r": 2, "lora_alpha": 5, "target_modules": ["k_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture
def model():
    """A tiny Llama with adapters `default` (q, v) and `second` (k, v)."""
    wrapped = pyadapt.wrap(build("llama"), LoraConfig(init_lora_weights=False))
    wrapped.add_adapter("second", LoraConfig(**SECOND))
    return wrapped


@pytest.fixture
def twin(model):
    """peft's model with the same two adapters."""
    import peft

    twin = peft_twin(build("llama"), target_modules=["q_proj", "v_proj"])
    twin.add_adapter("second", peft.LoraConfig(**SECOND))
    for name in ("default", "second"):
        copy_adapter_to_peft(model, twin, name)
    return twin.eval()


def logits(model):
    return model(**model_batch("llama")).logits.detach()


def trained(model):
    return {name.split(".adapters.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_add_in_either_order_and_by_keyword():
    model = pyadapt.wrap(build("llama"), LoraConfig())
    config = LoraConfig(r=2)
    model.add_adapter("peft_order", config)
    model.add_adapter(config, "transformers_order")
    model.add_adapter(adapter_name="by_keyword", peft_config=config)
    model.add_adapter(adapter_config=config, adapter_name="by_other_keyword")
    model.add_adapter("from_dict", {"peft_type": "LORA", "r": 3})
    names = ["default", "peft_order", "transformers_order", "by_keyword", "by_other_keyword", "from_dict"]
    assert list(model.peft_config) == names
    assert model.active_adapters == ["default"]
    with pytest.raises(TypeError, match="one configuration and one name"):
        model.add_adapter("only_a_name")
    with pytest.raises(TypeError, match="'nonsense'"):
        model.add_adapter("a", config, nonsense=1)
    assert list(model.peft_config) == names


def test_a_new_adapter_is_not_active(model):
    assert model.active_adapters == ["default"]
    assert trained(model) == {"default"}


def test_set_adapter_equals_peft(model, twin):
    for name in ("second", "default"):
        model.set_adapter(name)
        twin.set_adapter(name)
        assert model.active_adapters == [name]
        assert model.active_adapter == name
        assert trained(model) == {name}
        assert_near(logits(model), logits(twin), "model")


def test_several_at_once_are_summed_as_in_peft(model, twin):
    model.set_adapter(["default", "second"])
    twin.base_model.set_adapter(["default", "second"])
    assert_near(logits(model), logits(twin), "model")
    assert trained(model) == {"default", "second"}
    both = logits(model)
    model.set_adapter(["second", "default"])
    assert_near(logits(model), both, "model")


def test_several_at_once_with_dropout_differ_from_call_to_call(model):
    model.add_adapter("third", LoraConfig(lora_dropout=0.5, init_lora_weights=False))
    model.set_adapter(["default", "third"])
    still = logits(model)
    assert torch.equal(logits(model), still)
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_active_adapters_is_a_list_and_a_function(model):
    assert model.active_adapters == ["default"]
    assert model.active_adapters() == ["default"]
    assert isinstance(model.active_adapters, list)
    assert model.active_peft_config is model.peft_config["default"]


def test_disable_for_a_block(model):
    plain, active = logits(build("llama")), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), active)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(model), active)


def test_disable_and_enable(model):
    plain, active = logits(build("llama")), logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), active)


def test_delete(model, twin):
    model.delete_adapter("default")
    twin.set_adapter("second")
    twin.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    assert not any(".default." in key for key in model.state_dict())
    model.set_adapter("second")
    twin.set_adapter("second")
    assert_near(logits(model), logits(twin), "model")
    # Layers that only the deleted one was on are plain layers again.
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    model.delete_adapter("second")
    assert torch.equal(logits(model), logits(build("llama")))
    with pytest.raises(ValueError, match="no adapter any more"):
        _ = model.active_adapter
    model.add_adapter("again", LoraConfig())
    assert model.active_adapters == ["again"]


def test_deleting_the_active_one_leaves_another_active(model):
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert trained(model) == {"second"}


def test_deleting_an_inactive_one_changes_no_output(model):
    active = logits(model)
    model.delete_adapter("second")
    assert torch.equal(logits(model), active)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward", 3, None])
def test_names_that_cannot_be(name):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter name"):
        pyadapt.wrap(model, LoraConfig(), name)
    assert snapshot(model) == before
    assert not pyadapt.is_wrapped(model)


def test_names_that_are_taken(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    for attempt in (
        lambda: model.add_adapter("second", LoraConfig()),
        lambda: pyadapt.wrap(model, LoraConfig(), "second"),
        lambda: pyadapt.wrap(model, LoraConfig()),
        lambda: pyadapt.load(model, tmp_path, "second"),
    ):
        with pytest.raises(ValueError, match=r"there is an adapter called '(second|default)' already"):
            attempt()
        assert snapshot(model) == before


def test_unknown_names(model):
    before = snapshot(model)
    for attempt in (
        model.set_adapter,
        model.delete_adapter,
        model.get_adapter_state_dict,
        lambda n: model.merge_adapter([n]),
    ):
        with pytest.raises(ValueError, match="no adapter is called 'nobody'; there are 'default', 'second'"):
            attempt("nobody")
    for attempt in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="'nobody'"):
            attempt(["default", "nobody"])
        with pytest.raises(ValueError, match="nothing"):
            attempt([])
    assert snapshot(model) == before
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_unload_restores_everything(name):
    model = build(name).train()
    flags = iter([True, False] * 1000)
    for parameter in model.parameters():
        parameter.requires_grad_(next(flags))
    before = snapshot(model)
    pyadapt.wrap(model, LoraConfig(task_type=FAMILIES[name].task, init_lora_weights=False))
    model.add_adapter("second", LoraConfig(target_modules="all-linear"))
    model.set_adapter(["default", "second"])
    assert model.unload() is model
    assert snapshot(model) == before
    assert not pyadapt.is_wrapped(model)
    with pytest.raises(ValueError, match="carries no adapters"):
        pyadapt.unwrap(model)


def test_modules_to_save_of_two_adapters():
    model = pyadapt.wrap(build("bert"), LoraConfig(task_type="SEQ_CLS"))
    model.add_adapter("second", LoraConfig(task_type="SEQ_CLS"))
    batch = model_batch("bert")
    with torch.no_grad():
        model.classifier.copies["default"].bias.add_(1)
        model.classifier.copies["second"].bias.add_(2)
    model.set_adapter("default")
    one = model(**batch).logits
    model.set_adapter("second")
    two = model(**batch).logits
    assert_near(two - one, torch.ones_like(one), "model")
    with model.disable_adapter():
        assert_near(one - model(**batch).logits, torch.ones_like(one), "model")
    # The copy is of the base's own module, whichever adapter was active when it was made.
    model.add_adapter("third", LoraConfig(task_type="SEQ_CLS"))
    assert torch.equal(model.classifier.copies["third"].bias, model.classifier.bias)


def test_a_module_is_not_both_saved_and_adapted():
    """A second adapter may want the head as a layer; then each gets its own, and both can be switched."""
    model = pyadapt.wrap(build("llama"), LoraConfig(modules_to_save=["lm_head"]))
    model.add_adapter("second", LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    first = logits(model)
    model.set_adapter("second")
    assert not torch.allclose(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.unload()
    assert type(model.lm_head) is torch.nn.Linear


def test_get_base_model_and_isinstance(model):
    assert model.get_base_model() is model
    assert isinstance(model, type(build("llama")))
