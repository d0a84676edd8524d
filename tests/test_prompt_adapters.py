"""The life of a prompt adapter: planned, counted, trained, joined by others, switched, copied and taken off."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
from models import assert_near, build, model_batch, snapshot
from prompt_life_cases import (
    CASES,
    METHODS,
    PROMPTS,
    TOKENS,
    batch_of,
    config_of,
    output,
    step,
    stir,
    trained,
    wrapped,
)

import pyadapt
from pyadapt import LoraConfig

EVERY = pytest.mark.parametrize("method", METHODS)
CASE = pytest.mark.parametrize(("method", "family"), CASES)
HEADS = {"bert": 24 * 3 + 3}


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": False, **options})


@CASE
def test_a_plan_is_what_wrapping_does(method, family):
    base = build(family)
    before = snapshot(base)
    plan = pyadapt.plan(base, config_of(method, family))
    assert snapshot(base) == before
    model = pyadapt.wrap(base, config_of(method, family))
    counts = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert plan.trainable_parameters == sum(counts.values())
    _, found = step(model.train(), batch_of(method, family))
    assert counts.keys() == found.keys()
    assert plan.base_parameters == sum(parameter.numel() for parameter in build(family).parameters())
    assert (plan.trainable_parameters, plan.all_parameters) == model.get_nb_trainable_parameters()
    assert sum(plan.saved.values()) == HEADS.get(family, 0)
    table = str(plan)
    assert f"{plan.trainable_parameters:,} of {plan.all_parameters:,} parameters are trained" in table
    assert all(row.path in table and row.kernel for row in plan.layers)
    assert [row["layer"] for row in plan.as_table()] == [row.path for row in plan.layers] + list(plan.saved)
    assert plan.as_dict()["trainable_parameters"] == plan.trainable_parameters


# peft has LLaMA-Adapter for Llama, Mistral and GPT-2 alone.
@pytest.mark.parametrize(("method", "family"), [case for case in CASES if case != ("llama-adapter", "t5")])
def test_counts_are_those_of_peft(method, family, capsys):
    """All values: PEFT counts a head twice, its copy and the original."""
    import peft

    twin = peft.get_peft_model(build(family), peft_config(method, family))
    theirs, total = twin.get_nb_trainable_parameters()
    model = pyadapt.wrap(build(family), config_of(method, family))
    model.print_trainable_parameters()
    total -= HEADS.get(family, 0)
    assert capsys.readouterr().out == (
        f"trainable params: {theirs} || all params: {total} || trainable%: {100 * theirs / total}\n"
    )


def peft_config(method, family):
    import peft

    options = config_of(method, family).to_dict()
    kind = options.pop("peft_type")
    options.pop("peft_version")
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options)


@CASE
def test_second_adapters_are_named_switched_and_deleted(method, family):
    base = build(family)
    batch = batch_of(method, family)
    untouched = output(base, batch)
    model = wrapped(method, family, base=base)
    first = output(model, batch)
    model.add_adapter("other", config_of(method, family))
    stir(model, "other", seed=5)
    assert torch.equal(output(model, batch), first)
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    second = output(model, batch)
    assert not torch.equal(second, first)
    assert all("other" in name for name in trained(model))
    with model.disable_adapter():
        assert torch.equal(output(model, batch), untouched)
    assert torch.equal(output(model, batch), second)
    model.rename_adapter("other", "third")
    assert list(model.peft_config) == ["default", "third"]
    assert torch.equal(output(model, batch), second)
    model.disable_adapters()
    assert torch.equal(output(model, batch), untouched)
    model.enable_adapters()
    assert torch.equal(output(model, batch), second)
    model.set_requires_grad("default")
    model.set_requires_grad("third", False)
    assert all("default" in name for name in trained(model))
    model.delete_adapter("third")
    assert model.active_adapters == ["default"]
    assert torch.equal(output(model, batch), first)


def test_two_gated_prompts_add_up():
    model = wrapped("llama-adapter")
    model.add_adapter("other", config_of("llama-adapter"))
    model.set_adapter(["default", "other"])
    batch = batch_of("llama-adapter")
    # The other one's gates are closed.
    alone = output(model, batch)
    stir(model, "other", seed=3)
    together = output(model, batch)
    model.set_adapter(["other", "default"])
    assert_near(output(model, batch), together, "model")
    assert not torch.equal(together, alone)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("method", PROMPTS)
def test_beside_a_gated_prompt(method, family):
    """That one acts behind the attention, so that their order says nothing."""
    model = wrapped(method, family)
    model.add_adapter("gated", config_of("llama-adapter", family))
    stir(model, "gated")
    batch = batch_of(method, family)
    alone = output(model, batch)
    model.set_adapter(["default", "gated"])
    together = output(model, batch)
    assert together.shape == alone.shape
    assert not torch.equal(together, alone)
    model.set_adapter(["gated", "default"])
    assert_near(output(model, batch), together, "model")


@pytest.mark.parametrize("first", PROMPTS)
@pytest.mark.parametrize("second", PROMPTS)
def test_a_prompt_beside_a_prompt_of_another_method_is_refused(first, second):
    model = wrapped(first)
    model.add_adapter("other", config_of(second))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'default' and 'other' each put .* before the text"):
        model.set_adapter(["default", "other"])
    assert snapshot(model) == before
    assert model.active_adapters == ["default"]


@CASE
def test_reports_of_the_state(method, family):
    model = wrapped(method, family)
    model.add_adapter("other", config_of(method, family))
    plan = pyadapt.plan(build(family), config_of(method, family))
    layers = pyadapt.get_layer_status(model)
    assert [row.name for row in layers] == [
        path for path, _ in model.named_modules() if path in [*plan.saved, *(row.path for row in plan.layers)]
    ]
    for row in layers:
        assert row.available_adapters == ["default", "other"]
        assert row.active_adapters == ["default"]
        assert row.merged_adapters == []
    status = pyadapt.get_model_status(model)
    assert status.base_model_type == type(build(family)).__name__
    assert set(status.peft_types.values()) == {METHODS[method]["peft_type"]}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.enabled
    assert status.available_adapters == ["default", "other"]


@EVERY
def test_beside_lora(method):
    """Active together; LoRA alone can be merged, and a prompt cannot."""
    model = wrapped(method)
    model.add_adapter("lora", lora())
    batch = batch_of(method)
    model.set_adapter(["default", "lora"])
    both = output(model, batch)
    _, found = step(model.train(), batch)
    assert sorted(found) == sorted(trained(model))
    assert {"lora", "default"} == {name.split(".adapters.")[1].split(".")[0] for name in found}
    model.eval()
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: pyadapt.merge(model)):
        with pytest.raises(ValueError, match="'default' cannot be merged"):
            merge()
        assert snapshot(model) == before
    assert torch.equal(output(model, batch), both)
    model.set_adapter("lora")
    alone = output(model, batch)
    model.merge_adapter()
    assert_near(output(model, batch), alone, "merged")
    for verb in (lambda: model.add_adapter("more", config_of(method)), lambda: model.set_adapter("default")):
        with pytest.raises(RuntimeError, match="merged; unmerge_adapter"):
            verb()
    model.unmerge_adapter()
    assert torch.equal(output(model, batch), alone)
    plain = model.merge_and_unload(["lora"])
    assert type(plain) is type(build("llama"))
    assert_near(output(plain, {key: value for key, value in batch.items() if key != "task_ids"}), alone, "merged")


@EVERY
def test_a_prompt_on_a_merged_model_is_refused(method):
    model = pyadapt.wrap(build("llama"), lora())
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="cannot add an adapter: default is merged"):
        model.add_adapter("prompt", config_of(method))
    assert snapshot(model) == before


@EVERY
def test_no_adapter_of_its_own_for_each_row(method):
    model = wrapped(method)
    model.add_adapter("lora", lora())
    before = output(model, batch_of(method))
    with pytest.raises(ValueError, match=r"'default' cannot be chosen by row: .* whole batch"):
        model(**model_batch("llama"), adapter_names=["default", "lora"])
    assert torch.equal(output(model, batch_of(method)), before)
    rows = model(**model_batch("llama"), adapter_names=["__base__", "lora"]).logits.detach()
    with model.disable_adapter():
        untouched = output(model, model_batch("llama"))
    assert_near(rows[0], untouched[0], "model")


@CASE
def test_keys_copies_and_unwrapping(method, family):
    base = build(family)
    before, batch = snapshot(base), batch_of(method, family)
    keys, untouched = list(base.state_dict()), output(base, batch)
    model = wrapped(method, family, base=base)
    config = config_of(method, family)
    assert [key for key in model.state_dict() if ".default." not in f".{key}"] == keys
    assert type(model).__name__ == before["classes"][""].__name__
    expected = output(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, batch), expected)
        stir(twin)
        assert not torch.equal(output(twin, batch), expected)
        assert torch.equal(output(model, batch), expected)
        twin.set_adapter("default")
        assert trained(twin) == trained(model)
    plain = pyadapt.unwrap(model)
    assert plain is base
    assert snapshot(plain) == before
    assert torch.equal(output(plain, batch), untouched)
    assert config == config_of(method, family)


@EVERY
def test_a_module_of_choice_is_trained_whole(method):
    model = wrapped(method, modules_to_save=["lm_head"])
    assert "lm_head.copies.default.weight" in trained(model)
    batch = batch_of(method)
    with model.disable_adapter():
        assert torch.equal(output(model, batch), output(build("llama"), model_batch("llama")))
    _, found = step(model.train(), batch)
    assert bool(found["lm_head.copies.default.weight"].any())


@pytest.mark.parametrize("method", PROMPTS)
def test_the_text_of_a_model_names_the_prompt(method):
    assert f"virtual_tokens={TOKENS}" in str(wrapped(method))


@EVERY
def test_wrapping_says_nothing(method):
    """Neither warnings nor prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as said:
        warnings.simplefilter("error")
        model = pyadapt.wrap(build("t5"), config_of(method, "t5"))
        pyadapt.unwrap(model)
    assert said.getvalue() == ""
