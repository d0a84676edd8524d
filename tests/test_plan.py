"""plan: what wrap would do, in words and figures, with nothing changed."""

from __future__ import annotations

import json

import pytest
import torch
from models import ALL, FAMILIES, build, peft_twin, plain_module, snapshot

import pyadapt
from pyadapt import LoraConfig


@pytest.mark.parametrize("name", ALL)
def test_plan_changes_nothing_and_agrees_with_wrap(name):
    model = build(name)
    before = snapshot(model)
    config = LoraConfig(r=3, task_type=FAMILIES[name].task, rank_pattern={FAMILIES[name].targets[0]: 5})
    plan = pyadapt.plan(model, config)
    assert snapshot(model) == before
    pyadapt.wrap(model, config)
    units = {path: m.adapters["default"] for path, m in model.named_modules() if "adapters" in m._modules}
    assert [layer.path for layer in plan.layers] == list(units)
    for layer in plan.layers:
        unit, module = units[layer.path], model.get_submodule(layer.path)
        assert {unit.file_keys[name]: tuple(p.shape) for name, p in unit.named_parameters()} == layer.shapes
        assert layer.parameters == sum(p.numel() for p in unit.parameters())
        assert layer.layer == type(module).__name__
        assert layer.rank == unit.lora_A.shape[0]
        assert (layer.out_features, layer.in_features) == (unit.lora_B.shape[0], unit.lora_A.shape[1])
        assert layer.base == "dense"
        assert layer.kernel
    assert (plan.trainable_parameters, plan.all_parameters) == model.get_nb_trainable_parameters()


def test_plan_on_a_wrapped_model_counts_the_base_alone():
    model = build("llama")
    first = pyadapt.plan(model, LoraConfig())
    pyadapt.wrap(model, LoraConfig())
    again = pyadapt.plan(model, LoraConfig())
    assert again.as_dict() == first.as_dict()


def test_as_text():
    text = str(pyadapt.plan(build("bert"), LoraConfig(task_type="SEQ_CLS")))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kind", "base", "shape", "rank", "parameters", "kernel"]
    assert lines[1].startswith("bert.encoder.layer.0.attention.self.query")
    assert " Linear " in lines[1]
    assert " 24 x 24 " in lines[1]
    assert lines[-2].split()[:3] == ["classifier", "trained", "whole"]
    assert "parameters are trained" in lines[-1]
    assert len(lines) == 1 + 4 + 1 + 1


def test_the_table_holds_a_row_for_all_that_is_trained():
    plan = pyadapt.plan(build("bert"), LoraConfig(task_type="SEQ_CLS"))
    table = plan.as_table()
    assert [row["layer"] for row in table] == [layer.path for layer in plan.layers] + ["classifier"]
    assert table[0]["shape"] == "24 x 24"
    assert sum(int(row["parameters"].replace(",", "")) for row in table) == plan.trainable_parameters
    assert all(row["layer"] in str(plan) for row in table)


def test_as_dict_is_json():
    plan = pyadapt.plan(build("bert"), LoraConfig(task_type="SEQ_CLS"))
    values = json.loads(json.dumps(plan.as_dict()))
    assert values["config"]["target_modules"] == ["query", "value"]
    assert values["modules_to_save"] == {"classifier": 24 * 3 + 3}
    assert values["layers"][0]["shapes"] == {"lora_A.weight": [8, 24], "lora_B.weight": [24, 8]}
    assert values["trainable_parameters"] == plan.trainable_parameters


def test_quantised_layers_are_named():
    model = pyadapt.quantize(build("llama"))
    plan = pyadapt.plan(model, LoraConfig())
    assert {layer.base for layer in plan.layers} == {"int8"}
    assert {layer.layer for layer in plan.layers} == {"Linear"}
    assert plan.base_parameters == sum(p.numel() for p in build("llama").parameters())


def mt0_large():
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, vocab_size=250112, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    # Set afterwards: transformers 5 takes no such argument, and mT5's own checkpoints are untied.
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model = MT5ForConditionalGeneration(config)
    # transformers 5 takes "untied" to mean the encoder's and the decoder's embeddings too; only the head is.
    model.set_input_embeddings(model.shared)
    return model


def test_reference_figures_of_mt0_large(capsys):
    model = mt0_large()
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=8)
    plan = pyadapt.plan(model, config)
    assert plan.trainable_parameters == 2_359_296
    assert plan.all_parameters == 1_231_940_608
    pyadapt.wrap(model, config).print_trainable_parameters()
    expected = "trainable params: 2359296 || all params: 1231940608 || trainable%: 0.19151053100118282\n"
    assert capsys.readouterr().out == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ALL)
def test_figures_equal_those_of_peft_without_whole_modules(name):
    model = build(name)
    twin = peft_twin(model, target_modules=list(FAMILIES[name].targets))
    pyadapt.wrap(model, LoraConfig(target_modules=list(FAMILIES[name].targets)))
    assert model.get_nb_trainable_parameters() == twin.get_nb_trainable_parameters()


def test_a_module_to_save_counts_once(capsys):
    model = plain_module()
    everything = sum(p.numel() for p in model.parameters())
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["encoder.0"], modules_to_save=["classifier"]))
    lora, head = 2 * (7 + 11), 9 * 3 + 3
    assert model.get_nb_trainable_parameters() == (lora + head, everything + lora)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {lora + head} || all params: {everything + lora} ||")


def test_tied_weights_count_once():
    model = build("gpt2")
    assert pyadapt.plan(model, LoraConfig()).base_parameters == sum(p.numel() for p in model.parameters())
