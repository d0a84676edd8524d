"""`add_weighted_adapter` on whole models, against peft's. The arithmetic itself is in test_combining.py."""

from __future__ import annotations

import pytest
import torch
from models import assert_near, build, copy_adapter_to_peft, model_batch, peft_twin, snapshot

import pyadapt
from pyadapt import LoraConfig
from pyadapt.methods.lora.combining import KINDS

SAME = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def pair(first=None, second=None, family="llama"):
    """A model with two random adapters, and peft's twin of it."""
    import peft

    first, second = {**SAME, **(first or {})}, {**SAME, **(second or {})}
    model = pyadapt.wrap(build(family), LoraConfig(**first, init_lora_weights=False), "first")
    pyadapt.wrap(model, LoraConfig(**second, init_lora_weights=False), "second")
    twin = peft_twin(build(family), "first", **first)
    twin.add_adapter("second", peft.LoraConfig(**second))
    for name in ("first", "second"):
        copy_adapter_to_peft(model, twin, name)
    return model.eval(), twin.eval()


def outputs(model, twin, name="sum", family="llama"):
    batch = model_batch(family)
    model.set_adapter(name)
    twin.set_adapter(name)
    with torch.no_grad():
        return model(**batch).logits, twin(**batch).logits


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_peft(kind):
    model, twin = pair({"lora_alpha": 3}, {"lora_alpha": 7})
    options = {"combination_type": kind, "density": 1.0 if "dare" in kind else 0.6}
    twin.add_weighted_adapter(["first", "second"], [0.7, -0.4], "sum", **options)
    model.add_weighted_adapter(["first", "second"], [0.7, -0.4], "sum", **options)
    found, expected = outputs(model, twin)
    assert_near(found, expected, "merged")
    assert model.active_adapters == ["sum"]


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_kinds_keep_about_their_share(kind):
    model, _ = pair()
    torch.manual_seed(3)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum", combination_type=kind, density=0.5)
    torch.manual_seed(3)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "again", combination_type=kind, density=0.5)
    for (_, a), (_, b) in zip(
        model.get_adapter_state_dict("sum").items(), model.get_adapter_state_dict("again").items(), strict=True
    ):
        assert torch.equal(a, b)
    unit = model.model.layers[0].self_attn.q_proj.adapters["sum"]
    if kind == "dare_linear":
        # Both are dropped at a place with probability 1/4.
        assert 0.1 < float((unit.lora_A == 0).float().mean()) < 0.4


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_ranks_and_layers_that_differ(kind):
    options = {"combination_type": kind, "density": 0.7}
    model, twin = pair({"r": 2}, {"r": 5, "target_modules": ["v_proj", "up_proj"], "use_rslora": False})
    model.add_weighted_adapter(["first", "second"], [0.5, 2.0], "sum", **options)
    twin.add_weighted_adapter(["first", "second"], [0.5, 2.0], "sum", **options)
    found, expected = outputs(model, twin)
    assert_near(found, expected, "merged")


def test_cat_is_the_exact_weighted_sum():
    """Also with rsLoRA, where peft's result is sqrt(r) times too strong: the sum of the terms is the oracle."""
    model, _ = pair({"use_rslora": True}, {"use_rslora": True, "lora_alpha": 3})
    model.add_weighted_adapter(["first", "second"], [0.5, -1.5], "sum", combination_type="cat")
    layer = model.model.layers[1].self_attn.v_proj
    expected = 0.5 * layer.adapters["first"].delta() - 1.5 * layer.adapters["second"].delta()
    assert_near(layer.adapters["sum"].delta(), expected, "merged")


def test_the_new_adapter_is_like_any_other(tmp_path):
    model, _ = pair()
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "sum", combination_type="linear")
    assert model.active_adapters == ["first"]
    model.set_adapter("sum")
    batch = model_batch("llama")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = pyadapt.load(build("llama"), tmp_path / "sum")
    assert_near(again(**batch).logits, expected, "model")
    assert all(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)


def test_a_module_that_one_adapter_trains_whole():
    model = pyadapt.wrap(build("bert"), LoraConfig(task_type="SEQ_CLS"), "first")
    pyadapt.wrap(model, LoraConfig(), "second")
    with torch.no_grad():
        model.classifier.copies["first"].weight += 1
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum", combination_type="linear")
    assert torch.equal(model.classifier.copies["sum"].weight, model.classifier.copies["first"].weight)


@pytest.mark.parametrize(
    ("first", "second", "options", "match"),
    [
        ({}, {}, {"combination_type": "blend"}, "combination_type='blend' is not one of linear, cat"),
        ({}, {"r": 3}, {"combination_type": "linear"}, r"needs equal ranks, not \[4, 3\]"),
        ({}, {}, {"combination_type": "ties"}, "needs density"),
        ({}, {}, {"adapters": ["first", "nobody"]}, "no adapter is called 'nobody'"),
        ({}, {}, {"weights": [1.0]}, "weights has 1 numbers for 2 adapters"),
        ({}, {}, {"adapter_name": "first"}, "there is an adapter called 'first' already"),
        ({}, {}, {"weights": [1.0, float("nan")]}, "the weight of adapter 'second' is nan"),
    ],
)
def test_refused_before_anything_changes(first, second, options, match):
    model, _ = pair(first, second)
    before = snapshot(model)
    options = {"adapters": ["first", "second"], "weights": [1.0, 1.0], "adapter_name": "sum", **options}
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(**options)
    assert snapshot(model) == before
    assert list(model.peft_config) == ["first", "second"]


def test_copies_have_no_sum():
    model = pyadapt.wrap(build("bert"), LoraConfig(task_type="SEQ_CLS"), "first")
    pyadapt.wrap(model, LoraConfig(task_type="SEQ_CLS"), "second")
    with pytest.raises(ValueError, match="classifier is trained whole by first, second"):
        model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
