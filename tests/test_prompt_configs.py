"""Configurations of prompt methods: PEFT's keys and defaults, every form, and what the library makes of them."""

from __future__ import annotations

import copy
import dataclasses
import json

import peft
import pytest
import torch
import yaml
from models import build
from prompt_life_cases import CASES, METHODS, batch_of, config_of, output, stir, wrapped

import pyadapt
from pyadapt.config import AdapterConfig, as_config

EVERY = pytest.mark.parametrize("method", METHODS)
CASE = pytest.mark.parametrize(("method", "family"), CASES)
PEFT_CLASSES = {
    "PREFIX_TUNING": peft.PrefixTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig,
    "ADAPTION_PROMPT": peft.AdaptionPromptConfig,
}


def plain(value):
    return getattr(value, "value", value)


@pytest.mark.parametrize("kind", PEFT_CLASSES)
def test_keys_and_defaults_are_those_of_peft(kind):
    needed = {"adapter_len": 3, "adapter_layers": 1} if kind == "ADAPTION_PROMPT" else {"num_virtual_tokens": 3}
    ours, theirs = as_config({"peft_type": kind, **needed}).to_dict(), PEFT_CLASSES[kind](**needed).to_dict()
    # How peft runs it, which is in no file.
    theirs.pop("runtime_config", None)
    assert ours == {key: plain(value) for key, value in theirs.items()}


@EVERY
def test_configurations_in_every_form(method, tmp_path):
    config = config_of(method, modules_to_save=["lm_head"])
    config.save_pretrained(tmp_path)
    values = {**config.to_dict(), "inference_mode": True}
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == values
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for form in (config.to_dict(), tmp_path / "config.yaml", str(tmp_path / "config.json")):
        assert as_config(form) == config
    assert AdapterConfig.from_pretrained(tmp_path) == config.replaced(inference_mode=True)
    if method != "llama-adapter":
        theirs = PEFT_CLASSES[config.peft_type].from_pretrained(tmp_path)
        assert as_config(theirs) == config.replaced(inference_mode=True)
        assert as_config(copy.deepcopy(config)) == config


@EVERY
def test_a_configuration_of_peft_wraps(method):
    """With its enumerations; and it is left as it was."""
    values = config_of(method).to_dict()
    theirs = PEFT_CLASSES[values.pop("peft_type")](**{k: v for k, v in values.items() if k != "peft_version"})
    before = copy.deepcopy(theirs)
    torch.manual_seed(0)
    model = stir(pyadapt.wrap(build("llama"), theirs))
    assert torch.equal(output(model, batch_of(method)), output(wrapped(method), batch_of(method)))
    assert dataclasses.asdict(theirs) == dataclasses.asdict(before)


@pytest.mark.parametrize(
    ("method", "option", "names"),
    [
        ("prompt", "prompt_tuning_init", ["RANDOM", "SAMPLE_VOCAB"]),
        ("multitask", "prompt_tuning_init", ["RANDOM"]),
        ("P-tuning", "encoder_reparameterization_type", ["MLP", "LSTM"]),
    ],
)
def test_choices_by_name_and_by_enumeration(method, option, names):
    for name in names:
        by_name = config_of(method, **{option: name})
        assert config_of(method, **{option: getattr(by_name, option)}) == by_name
        assert by_name.to_dict()[option] == name
    with pytest.raises(ValueError, match=f"{option}='other' is not one of .*{names[-1]}"):
        config_of(method, **{option: "other"})


@CASE
def test_what_the_library_chose_is_in_the_file_and_not_in_the_users_configuration(method, family, tmp_path):
    config = config_of(method, family)
    given = copy.deepcopy(config)
    model = pyadapt.wrap(build(family), config)
    assert config == given
    model.save_pretrained(tmp_path)
    held = json.loads((tmp_path / "adapter_config.json").read_text())
    if method == "llama-adapter":
        assert held["target_modules"] == {"llama": "self_attn", "gpt2": "attn", "t5": "SelfAttention"}[family]
        return
    theirs = peft.get_peft_model(build(family), PEFT_CLASSES[held["peft_type"]](**peft_options(config)))
    chosen = theirs.peft_config["default"]
    for name in ("num_layers", "num_transformer_submodules", "token_dim", "num_attention_heads"):
        assert held[name] == getattr(chosen, name), name


def peft_options(config):
    return {key: value for key, value in config.to_dict().items() if key not in ("peft_type", "peft_version")}


def test_the_adapter_of_roberta_large_on_the_meta_device():
    """The figures of the product's table."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    shapes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    shapes |= {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 2}
    with torch.device("meta"):
        base = RobertaForSequenceClassification(RobertaConfig(**shapes))
    config = pyadapt.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=20, encoder_hidden_size=128)
    plan = pyadapt.plan(base, config)
    assert (plan.trainable_parameters, plan.all_parameters) == (1351938, 355662082)
    model = pyadapt.wrap(base, config)
    assert model.get_nb_trainable_parameters() == (1351938, 355662082)
