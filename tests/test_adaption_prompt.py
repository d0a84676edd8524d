"""LLaMA-Adapter on every decoder of the product, against its definition in fp64 and against peft."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from adaption_prompt_cases import (
    DECODERS,
    LENGTH,
    ROWS,
    add_by_definition,
    batch_of,
    build,
    gates,
    greedy,
    logits,
    open_gates,
    step,
    wrapped,
)
from models import assert_near, snapshot

import pyadapt
from pyadapt import AdaptionPromptConfig

EVERY = pytest.mark.parametrize("name", DECODERS)
# What peft has the method for.
PEFTS = ["LlamaForCausalLM", "MistralForCausalLM", "GPT2LMHeadModel"]


@EVERY
def test_at_step_zero_it_is_the_base_bit_for_bit(name):
    model, batch = build(name), batch_of(name)
    before = logits(model, batch)
    model = wrapped(model, gate=None)
    assert torch.equal(logits(model, batch), before)
    _, found = step(model.train(), batch)
    assert len(found) == 4
    assert all(bool(found[key].any()) for key, _ in gates(model))


@EVERY
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_outputs_and_gradients_are_those_of_the_definition(name, implementation):
    plain, batch = build(name, torch.float64), batch_of(name, torch.float64)
    plain.set_attn_implementation(implementation)
    # Its norms of heads are fp32, and see other gradients where two products read one query.
    coarsest = torch.float32 if name == "Qwen3ForCausalLM" else torch.float64
    untouched = logits(plain, batch)
    model = wrapped(copy.deepcopy(plain))
    adapters = {
        path: tuple(parameter.detach().clone().requires_grad_() for parameter in (unit.prompt, unit.gate))
        for path in map(DECODERS[name].format, (0, 1))
        for unit in [model.get_submodule(path).adapters["default"]]
    }
    add_by_definition(plain.requires_grad_(False), adapters)
    expected = plain(**batch)
    expected.loss.backward()
    output = model(**batch)
    output.loss.backward()
    assert not torch.allclose(output.logits, untouched)
    assert_near(output.logits, expected.logits, "model", torch.float64)
    for path, parameters in adapters.items():
        unit = model.get_submodule(path).adapters["default"]
        for parameter, exact in zip((unit.prompt, unit.gate), parameters, strict=True):
            assert bool(exact.grad.any())
            assert_near(parameter.grad, exact.grad, "gradient", coarsest)


def test_the_bias_of_the_output_projection_counts_once():
    """peft sends its term through the projection by itself, so that its bias is added twice, even at step 0."""
    from transformers import LlamaForCausalLM

    config = build("LlamaForCausalLM").config
    config.attention_bias = True
    plain = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model = wrapped(copy.deepcopy(plain), layers=1)
    unit = model.model.layers[1].self_attn.adapters["default"]
    add_by_definition(plain, {"model.layers.1.self_attn": (unit.prompt, unit.gate)})
    batch = batch_of("LlamaForCausalLM")
    assert_near(logits(model, batch), logits(plain, batch), "model")


@EVERY
def test_generate_is_the_same_with_and_without_a_cache(name):
    model = wrapped(build(name), gate=3.0)
    with model.disable_adapter():
        untouched = greedy(model, name)
    found = greedy(model, name)
    assert not torch.equal(found, untouched)
    assert torch.equal(greedy(model, name, use_cache=False), found)
    assert torch.equal(greedy(model, name, cache_implementation="static"), found)
    beams = greedy(model, name, num_beams=3)
    assert torch.equal(greedy(model, name, num_beams=3, use_cache=False), beams)


@pytest.mark.parametrize("name", [name for name in DECODERS if "CausalLM" in name or "LMHead" in name])
def test_a_row_padded_on_the_left_gives_what_it_gives_alone(name):
    model = wrapped(build(name), gate=3.0)
    alone = batch_of(name)["input_ids"][:1, :3]
    batch = {
        "input_ids": torch.cat([torch.zeros(1, 2, dtype=torch.long), alone], dim=1),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
    }
    new = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**batch, **new)[0, 5:], model.generate(alone, **new)[0, 3:])


@EVERY
def test_a_second_adapter_is_switched_to(name):
    model, batch = wrapped(build(name)), batch_of(name)
    first = logits(model, batch)
    model.add_adapter("second", AdaptionPromptConfig(adapter_len=2, adapter_layers=1))
    open_gates(model, 2.0, "second")
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("second")
    second = logits(model, batch)
    assert not torch.equal(second, first)
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch), second)


def test_swapping_in_an_adapter_of_fewer_layers_closes_the_other_gates(tmp_path):
    name = "LlamaForCausalLM"
    top, batch = wrapped(build(name), layers=1, gate=1.1), batch_of(name)
    top.save_pretrained(tmp_path)
    model = wrapped(build(name))
    held = {key: id(parameter) for key, parameter in model.named_parameters()}
    assert model.hotswap_adapter(tmp_path)
    assert held == {key: id(parameter) for key, parameter in model.named_parameters()}
    assert torch.equal(logits(model, batch), logits(top, batch))


# Against peft.


def twins(name, folder, **options):
    """Our model and peft's with the same weights, through a file of ours."""
    plain = build(name)
    model = wrapped(copy.deepcopy(plain), gate=1.3, task_type="CAUSAL_LM", **options)
    model.save_pretrained(folder)
    return model, peft.PeftModel.from_pretrained(plain, folder, is_trainable=True).eval()


@pytest.mark.parametrize("name", PEFTS)
def test_a_step_is_that_of_peft(name, tmp_path):
    model, twin = twins(name, tmp_path)
    batch = batch_of(name)
    assert_near(logits(model, batch), logits(twin, batch), "model")
    loss, ours = step(model, batch)
    expected, theirs = step(twin, batch)
    assert_near(loss, expected, "loss")
    assert len(ours) == len(theirs) == 4
    for key, gradient in ours.items():
        path, _, attribute = key.partition(".adapters.default.")
        other = theirs[f"base_model.model.{path}.adaption_{attribute}"]
        assert_near(gradient, other, "gradient")
    assert model.get_nb_trainable_parameters()[0] == twin.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", PEFTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"do_sample": True, "top_k": 20},
    ],
    ids=str,
)
def test_generate_gives_the_tokens_of_peft(name, options, tmp_path):
    model, twin = twins(name, tmp_path)
    found = []
    for each in (model, twin):
        torch.manual_seed(5)
        found.append(greedy(each, name, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", PEFTS)
def test_files_of_peft_are_read(name, tmp_path):
    plain = build(name)
    twin = peft.get_peft_model(
        copy.deepcopy(plain), peft.AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=1, task_type="CAUSAL_LM")
    ).eval()
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            if key.endswith("adaption_gate"):
                parameter.fill_(1.1)
    twin.save_pretrained(tmp_path)
    model = pyadapt.load(plain, tmp_path)
    assert_near(logits(model, batch_of(name)), logits(twin, batch_of(name)), "model")
    assert [path for path, _ in gates(model)] == [f"{DECODERS[name].format(1)}.adapters.default.gate"]


@EVERY
def test_layers_count_from_the_top(name):
    plan = pyadapt.plan(build(name), AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=1))
    assert [row.path for row in plan.layers] == [DECODERS[name].format(1)]
    assert plan.trainable_parameters == LENGTH * plan.layers[0].in_features + 1
    assert plan.config.target_modules == DECODERS[name].rpartition(".")[2]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("LlamaForCausalLM", {"adapter_layers": 3}, r"adapter_layers=3: .*\b2\b"),
        ("LlamaForCausalLM", {"adapter_layers": None}, "needs adapter_layers"),
        ("LlamaForCausalLM", {"adapter_len": None}, "needs adapter_len"),
        ("LlamaForCausalLM", {"adapter_len": 0}, "adapter_len=0"),
        ("LlamaForCausalLM", {"adapter_len": True}, "adapter_len=True"),
        ("LlamaForCausalLM", {"adapter_layers": 1.0}, r"adapter_layers=1\.0"),
        ("LlamaForCausalLM", {"adapter_layers": -1}, "adapter_layers=-1"),
        ("LlamaForCausalLM", {"target_modules": "attn"}, "target_modules='attn'.*self_attn"),
        ("LlamaForCausalLM", {"target_modules": "q_proj"}, "target_modules='q_proj'.*self_attn"),
        ("LlamaForCausalLM", {"target_modules": ["self_attn"]}, r"target_modules=\['self_attn'\].*one name"),
        ("LlamaForCausalLM", {"adapter_length": 3}, "no key 'adapter_length'.*adapter_len"),
        ("BertForSequenceClassification", {}, "for decoders.*BertForSequenceClassification"),
        ("RobertaForTokenClassification", {}, "for decoders"),
        ("DebertaV2ForQuestionAnswering", {}, "for decoders"),
        ("ViTForImageClassification", {}, "for decoders"),
        ("PlainNet", {}, "for decoders"),
    ],
    ids=str,
)
def test_bad_input_changes_nothing(name, options, message):
    model = build(name)
    before = snapshot(model)
    values = {"peft_type": "ADAPTION_PROMPT", "adapter_len": LENGTH, "adapter_layers": 1, **options}
    with pytest.raises(ValueError, match=message):
        pyadapt.wrap(model, values)
    assert snapshot(model) == before


def test_an_attention_that_takes_no_masks_is_refused():
    model = build("LlamaForCausalLM")
    model.config._attn_implementation = "flash_attention_2"
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.\d\.self_attn: .*flash_attention_2.*set_attn_implementation"):
        wrapped(model)
    assert snapshot(model) == before


def test_every_row_of_the_product_is_here():
    causal = {row.model_class for row in ROWS.values() if row.generates and not row.missing}
    assert causal - DECODERS.keys() <= {"MT5ForConditionalGeneration", "Qwen3MoeForCausalLM"}
