"""What users get wrong: one clear exception each, and a model that stays as it was."""

from __future__ import annotations

import pytest
import torch
from models import build, model_batch, plain_module, snapshot
from torch import nn

import pyadapt
from pyadapt import LoraConfig


def refused(config, match, name="llama", error=ValueError):
    """wrap, plan and add_adapter raise the same, and change nothing."""
    plain, wrapped = build(name), pyadapt.wrap(build(name), LoraConfig())
    for model, act in (
        (plain, pyadapt.wrap),
        (plain, pyadapt.plan),
        (wrapped, pyadapt.plan),
        (wrapped, lambda model, config: model.add_adapter("new", config)),
        (wrapped, lambda model, config: pyadapt.wrap(model, config, "new")),
    ):
        before = snapshot(model)
        with pytest.raises(error, match=match):
            act(model, config)
        assert snapshot(model) == before
    assert not pyadapt.is_wrapped(plain)
    assert list(wrapped.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"target_modules": ["q_prj"]}, r"no module is named 'q_prj'; the nearest are .*q_proj"),
        ({"target_modules": ["self_atn.q_proj"]}, r"no module is named 'self_atn\.q_proj'; the nearest are .*q_proj"),
        ({"target_modules": ["qq", "zz"]}, r"'qq'.*'zz'"),
        ({"target_modules": r".*\.q_prj"}, r"matches no module; linear layers of this model: model\.layers\.0"),
        ({"target_modules": []}, r"target_modules=\[\] matches no module"),
        (
            {"target_modules": ["self_attn"]},
            r"is a LlamaAttention, which no adapter can be put on; linear layers inside it: .*q_proj",
        ),
        ({"target_modules": ["input_layernorm"]}, r"is a LlamaRMSNorm, which no adapter can be put on"),
        ({"target_modules": r".*"}, r"no adapter can be put on"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"matches 2 layers .*, but exclude_modules"),
        ({"layers_to_transform": [7]}, r"layers_to_transform .*leaves none"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, r"leaves none"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save: no module is named 'lm_haed'; the nearest are .*lm_head"),
        ({"rank_pattern": {"k_proj": 2}}, r"rank_pattern 'k_proj' matches none of the 4 adapted layers"),
        ({"alpha_pattern": {"nothing": 2}}, r"alpha_pattern 'nothing' matches none"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit_the_model(config, match):
    refused(LoraConfig(**config), match)


@pytest.mark.parametrize(
    "option", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_a_bad_regular_expression(option):
    value = {"*.q_proj": 3} if option in ("rank_pattern", "alpha_pattern") else "*.q_proj"
    with pytest.raises(ValueError, match=rf"{option}='\*\.q_proj' is no regular expression: nothing to repeat"):
        LoraConfig(**{"layers_to_transform": [0], option: value})


def test_a_list_of_which_only_some_are_there_is_a_warning(caplog):
    model = pyadapt.wrap(build("llama"), LoraConfig(target_modules=["q_proj", "query"]))
    assert "target_modules not in this model: query" in caplog.text
    assert model.peft_config["default"].target_modules == ["q_proj", "query"]


def test_a_model_without_linear_layers():
    model = nn.Sequential(nn.LayerNorm(2), nn.ReLU())
    for targets, told in ((None, "linear layer"), ("all-linear", "linear layer"), (["0"], "no adapter")):
        before = snapshot(model)
        with pytest.raises(ValueError, match=told):
            pyadapt.wrap(model, LoraConfig(target_modules=targets))
        assert snapshot(model) == before


def test_a_plain_module_without_attention_says_what_to_do():
    with pytest.raises(ValueError, match='target_modules="all-linear"'):
        pyadapt.wrap(plain_module(), LoraConfig())


def test_configurations_of_a_wrong_kind():
    refused(3, "not int", error=TypeError)
    refused({"r": 3}, "no peft_type")
    refused({"peft_type": "LORA", "rr": 3}, "no key 'rr'")


@pytest.mark.parametrize("quantised", [False, True])
def test_inputs_of_a_wrong_shape_or_dtype(quantised):
    model = nn.Sequential(nn.Linear(6, 4))
    if quantised:
        pyadapt.quantize(model, skip=[])
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["0"]))
    before = snapshot(model)
    for x in (torch.randn(3, 5), torch.randn(3, 7), torch.randn(5), torch.randn(0, 5), torch.tensor(1.0)):
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
            model(x)
    for dtype in (torch.int64, torch.bool, torch.int8, torch.complex64):
        for act in (model, model[0]):
            with pytest.raises(TypeError, match=f"has dtype {dtype}; a floating dtype is needed"):
                act(torch.ones(3, 6, dtype=dtype))
    for x in (None, "x", [1.0], 3):
        with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)):
            model(x)
    assert snapshot(model) == before
    assert model(torch.randn(3, 6)).shape == (3, 4)


def test_token_ids_out_of_range_leave_the_model_usable():
    model = pyadapt.wrap(build("llama"), LoraConfig())
    batch = model_batch("llama")
    expected = model(**batch).logits
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10_000]]))
    assert torch.equal(model(**batch).logits, expected)


def test_nan_in_the_input_stays_where_it_is():
    model = nn.Sequential(nn.Linear(6, 4))
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 6)
    x[1, 2] = float("nan")
    bad = torch.isnan(model(x)).all(1)
    assert bad.tolist() == [False, True, False]


def test_out_of_memory_while_wrapping_leaves_the_model(monkeypatch):
    """All adapter weights are made before the first layer is changed."""
    from pyadapt.methods import lora

    model, made = build("llama"), []
    before = snapshot(model)
    real = lora.LoraUnit.initialize

    def fails_at_the_third(self, *context):
        made.append(self)
        if len(made) == 3:
            raise torch.OutOfMemoryError("no memory left")
        real(self, *context)

    monkeypatch.setattr(lora.LoraUnit, "initialize", fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        pyadapt.wrap(model, LoraConfig())
    assert snapshot(model) == before
    assert not pyadapt.is_wrapped(model)
    monkeypatch.undo()
    wrapped = pyadapt.wrap(model, LoraConfig())
    made.clear()
    before = snapshot(wrapped)
    monkeypatch.setattr(lora.LoraUnit, "initialize", fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        wrapped.add_adapter("second", LoraConfig())
    assert snapshot(wrapped) == before
    assert list(wrapped.peft_config) == ["default"]


def test_an_interrupt_while_wrapping_leaves_the_model(monkeypatch):
    from pyadapt import attach

    model = build("llama")
    before = snapshot(model)
    calls = []
    real = attach.add_unit

    def interrupted(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(attach, "add_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pyadapt.wrap(model, LoraConfig())
    assert snapshot(model) == before
    assert not pyadapt.is_wrapped(model)


@pytest.mark.parametrize("act", [pyadapt.unwrap, pyadapt.merge])
def test_verbs_on_a_plain_model(act):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="this LlamaForCausalLM carries no adapters of pyadapt"):
        act(model)
    assert snapshot(model) == before
