"""Which layers a configuration means, checked against the ones that peft chooses."""

from __future__ import annotations

import logging

import pytest
from models import ALL, FAMILIES, build, peft_twin, plain_module

import pyadapt
from pyadapt import LoraConfig


def adapted(model):
    return [path for path, module in model.named_modules() if "adapters" in module._modules]


def adapted_by_peft(twin):
    return [
        path.removeprefix("base_model.model.") for path, module in twin.named_modules() if hasattr(module, "lora_A")
    ]


def written_out(config):
    """An id that is the same in every process: sets have no order."""
    return " ".join(f"{key}={sorted(v) if isinstance(v, set) else v}" for key, v in config.items())


def both(name, ours=None, **config):
    """The layers that we and peft adapt for the same configuration."""
    model = build(name)
    twin = peft_twin(model, **config)
    return adapted(pyadapt.wrap(model, LoraConfig(**(config if ours is None else ours)))), adapted_by_peft(twin)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("vit", "olmo")])
def test_left_out_as_peft_has_them_in_its_table(name):
    ours, theirs = both(name)
    assert ours == theirs
    assert len(ours) == FAMILIES[name].target_count
    assert {path.rpartition(".")[2] for path in ours} == set(FAMILIES[name].targets)


@pytest.mark.parametrize("name", ["vit", "olmo"])
def test_left_out_where_peft_has_no_table_row(name):
    with pytest.raises(ValueError, match="target_modules"):
        peft_twin(build(name))
    ours = adapted(pyadapt.wrap(build(name), LoraConfig()))
    assert len(ours) == FAMILIES[name].target_count
    assert {path.rpartition(".")[2] for path in ours} == set(FAMILIES[name].targets)


def test_choice_by_structure_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="pyadapt"):
        pyadapt.wrap(build("olmo"), LoraConfig())
    assert "chose ['q_proj', 'v_proj'] by structure" in caplog.text


@pytest.mark.parametrize("name", ALL)
def test_all_linear(name):
    ours, theirs = both(name, target_modules="all-linear", task_type=FAMILIES[name].task)
    assert ours == theirs
    assert len(ours) == FAMILIES[name].all_linear_count


def test_all_linear_of_a_plain_module_leaves_the_head_out():
    ours = adapted(pyadapt.wrap(plain_module(), LoraConfig(target_modules="all-linear")))
    assert ours == ["encoder.0", "encoder.2"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "up_proj"]},
        {"target_modules": ["model.layers.1.mlp.down_proj"]},
        {"target_modules": {"k_proj", "v_proj"}},
        {"target_modules": r".*\.1\.self_attn\.[qk]_proj"},
        {"target_modules": r"model\.layers\.0\.mlp\.(gate|up)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=written_out,
)
def test_the_same_layers_as_peft(config):
    ours, theirs = both("llama", **config)
    assert ours
    assert ours == theirs


def test_a_list_matches_at_dots_only():
    model = build("t5")
    assert all(
        path.rpartition(".")[2] == "o" for path in adapted(pyadapt.wrap(model, LoraConfig(target_modules=["o"])))
    )


def test_a_module_to_save_is_not_adapted_as_well():
    model = build("llama")
    pyadapt.wrap(model, LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]))
    assert "lm_head" not in adapted(model)
    assert "copies" in model.lm_head._modules


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_heads_of_a_task_are_saved_by_themselves(name):
    model = build(name)
    assert list(pyadapt.plan(model, LoraConfig(task_type="SEQ_CLS")).saved) == ["classifier"]
    assert list(pyadapt.plan(model, LoraConfig()).saved) == []


def test_a_head_called_score():
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(build("llama").config)
    assert list(pyadapt.plan(model, LoraConfig(task_type="SEQ_CLS")).saved) == ["score"]
    twin = peft_twin(model, target_modules="all-linear", task_type="SEQ_CLS")
    assert adapted(
        pyadapt.wrap(model, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    ) == adapted_by_peft(twin)


SCALINGS = [
    {"r": 8, "lora_alpha": 16},
    {"r": 6, "lora_alpha": 3, "use_rslora": True},
    {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 2}},
    {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
    {
        "r": 4,
        "rank_pattern": {r"layers\.1\..*": 5},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 7},
        "use_rslora": True,
    },
    {
        "r": 4,
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 5, "q_proj": 3},
        "alpha_pattern": {"q_proj": 2, ".*v_proj": 9},
    },
]


@pytest.mark.parametrize("config", SCALINGS, ids=written_out)
def test_ranks_and_scalings_equal_those_of_peft(config):
    model = build("llama")
    twin = peft_twin(model, target_modules=["q_proj", "v_proj"], **config)
    pyadapt.wrap(model, LoraConfig(target_modules=["q_proj", "v_proj"], **config))
    paths = adapted(model)
    assert len(paths) == 4
    for path in paths:
        theirs = twin.get_submodule(f"base_model.model.{path}")
        ours = model.get_submodule(path).adapters["default"]
        assert ours.lora_A.shape[0] == theirs.r["default"]
        assert ours.scaling == pytest.approx(theirs.scaling["default"], rel=1e-12)


def test_the_table_is_that_of_peft():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT

    from pyadapt.targets import DEFAULT_TARGETS

    assert {name: PEFT[name] for name in DEFAULT_TARGETS} == DEFAULT_TARGETS


TABLE_ROWS = [
    "bart",
    "bert",
    "bloom",
    "deberta",
    "deberta-v2",
    "electra",
    "falcon",
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "layoutlm",
    "llama",
    "mistral",
    "mixtral",
    "mpt",
    "mt5",
    "opt",
    "phi",
    "qwen2",
    "qwen3",
    "roberta",
    "stablelm",
    "t5",
    "xlm-roberta",
]


@pytest.mark.parametrize(
    "model_type",
    TABLE_ROWS,
)
def test_each_row_of_the_table_exists_in_transformers(model_type):
    """A release that renames layers leaves a row pointing at nothing, as ViT's did."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(model_type)
    for name in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers"):
        if name in config.attribute_map or hasattr(config, name):
            setattr(config, name, 2)
    if model_type == "gpt_neo":
        config.attention_layers = ["global", "local"]
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert len(pyadapt.plan(model, LoraConfig()).layers) >= 2


def test_default_targets_are_the_users_own_list():
    model = pyadapt.wrap(build("llama"), LoraConfig())
    model.peft_config["default"].target_modules.append("lm_head")
    assert pyadapt.plan(build("llama"), LoraConfig()).config.target_modules == ["q_proj", "v_proj"]
