"""Configurations: made of anything that users hold, refused with the way out, never changed."""

from __future__ import annotations

import copy
import json

import pytest

import pyadapt
from pyadapt import AdapterConfig, LoraConfig, TaskType

VALUES = {
    "r": 6,
    "lora_alpha": 12,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "init_lora_weights": "gaussian",
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["k_proj"],
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"v_proj": 5},
    "task_type": "CAUSAL_LM",
    "revision": "main",
}


def as_config(source):
    from pyadapt.config import as_config

    return as_config(source)


@pytest.fixture
def config():
    return LoraConfig(**VALUES)


def test_defaults_are_those_of_peft():
    import peft

    theirs, ours = peft.LoraConfig().to_dict(), LoraConfig().to_dict()
    for key in ("peft_version", "runtime_config"):
        theirs.pop(key, None)
        ours.pop(key, None)
    theirs["peft_type"] = theirs["peft_type"].value
    assert ours == theirs


def test_from_a_dict(config):
    assert as_config({"peft_type": "LORA", **VALUES}) == config
    assert AdapterConfig.from_dict({"peft_type": "LORA", **VALUES}) == config
    assert LoraConfig.from_dict(VALUES) == config
    assert as_config({"pet_type": "LORA", **VALUES}) == config
    assert isinstance(config.task_type, TaskType)


def test_from_a_json_file(config, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **VALUES}))
    assert as_config(tmp_path / "adapter_config.json") == config
    assert as_config(str(tmp_path / "adapter_config.json")) == config
    assert AdapterConfig.from_json((tmp_path / "adapter_config.json").read_text()) == config
    assert AdapterConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_from_a_yaml_file(config, tmp_path, suffix):
    import yaml

    text = yaml.safe_dump({"peft_type": "LORA", **VALUES})
    (tmp_path / f"a.{suffix}").write_text(text)
    assert as_config(tmp_path / f"a.{suffix}") == config
    assert AdapterConfig.from_yaml(text) == config


def test_yaml_runs_no_code(tmp_path):
    (tmp_path / "a.yaml").write_text("peft_type: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        as_config(tmp_path / "a.yaml")


def test_from_an_object_of_peft(config):
    import peft

    assert as_config(peft.LoraConfig(**VALUES)) == config
    from_set = as_config(peft.LoraConfig(target_modules={"v_proj", "q_proj"}))
    assert from_set.target_modules == ["q_proj", "v_proj"]


def test_round_trips(config, tmp_path):
    assert AdapterConfig.from_dict(config.to_dict()) == config
    assert AdapterConfig.from_json(json.dumps(config.to_dict())) == config
    config.save_pretrained(tmp_path / "new" / "folder")
    read = AdapterConfig.from_pretrained(tmp_path / "new" / "folder")
    assert read == config.replaced(inference_mode=True)
    import peft

    theirs = peft.PeftConfig.from_pretrained(tmp_path / "new" / "folder")
    assert AdapterConfig.from_peft(theirs) == read


def test_replaced_and_to_dict_leave_it_alone(config):
    before = copy.deepcopy(vars(config))
    other = config.replaced(r=2, no_such_key=3)
    config.to_dict()["rank_pattern"]["x"] = 1
    assert (other.r, config.r) == (2, 6)
    assert vars(config) == before


def test_sets_and_tuples_become_sorted_lists():
    config = LoraConfig(target_modules={"b", "a", "c"}, exclude_modules=("d",), modules_to_save={"y", "x"})
    assert (config.target_modules, config.exclude_modules, config.modules_to_save) == (
        ["a", "b", "c"],
        ["d"],
        ["x", "y"],
    )


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"lora_ranks": 3}, r"LoraConfig has no key 'lora_ranks'"),
        ({"lora_dropuot": 0.1}, r"no key 'lora_dropuot'; did you mean 'lora_dropout'\?"),
        ({"target_module": ["q"]}, r"did you mean 'target_modules'\?"),
        ({"r": 0}, r"r=0: a rank is a whole number of at least 1"),
        ({"r": -4}, r"r=-4"),
        ({"r": 8.0}, r"r=8\.0"),
        ({"r": True}, r"r=True"),
        ({"rank_pattern": {"q_proj": 0}}, r"q_proj=0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 is not in \[0, 1\)"),
        ({"lora_dropout": -0.1}, r"lora_dropout=-0\.1"),
        ({"task_type": "SEQ_CLASS"}, r"task_type='SEQ_CLASS' is not one of SEQ_CLS, "),
        ({"init_lora_weights": "loft"}, r"init_lora_weights='loft' is not one of True, False, 'gaussian'"),
        ({"layers_pattern": "h"}, r"needs layers_to_transform"),
    ],
    ids=str,
)
def test_refused(values, match):
    with pytest.raises(ValueError, match=match):
        AdapterConfig.from_dict({"peft_type": "LORA", **values})


@pytest.mark.parametrize(
    "option",
    [
        {"use_qalora": True},
        {"layer_replication": [[0, 2]]},
    ],
    ids=str,
)
def test_options_that_pyadapt_lacks_are_an_error_unless_they_are_off(option):
    import peft

    (key,) = option
    with pytest.raises(ValueError, match=f"{key}=.*has no such option"):
        as_config({"peft_type": "LORA", **option})
    with pytest.raises(ValueError, match=f"{key}=.*has no such option"):
        as_config(peft.LoraConfig(**option))
    assert as_config({"peft_type": "LORA", key: LoraConfig.neutral_keys[key]}) == LoraConfig()


def test_an_unknown_method():
    with pytest.raises(ValueError, match=r"peft_type 'LORAX' is not one of .*LORA"):
        as_config({"peft_type": "LORAX"})
    with pytest.raises(ValueError, match=r"no peft_type; one of .*LORA"):
        as_config({"r": 8})


def test_not_a_configuration():
    for source in (3, None, ["LORA"], LoraConfig):
        with pytest.raises(TypeError, match="a pyadapt or peft config, a dict or a path"):
            as_config(source)
    with pytest.raises(TypeError, match="names no method"):
        as_config(AdapterConfig())


def test_a_missing_file(tmp_path):
    for name in ("a.json", "a.yaml"):
        with pytest.raises((OSError, ValueError), match=name):
            as_config(tmp_path / name)


@pytest.mark.parametrize("text", ["{", "[1]", '"LORA"', "{'r': 1}"], ids=range(4))
def test_a_file_that_is_no_mapping(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        as_config(tmp_path / "a.json")


def test_task_types_are_those_of_peft():
    import peft

    assert {task.value for task in TaskType} == {task.value for task in peft.TaskType}


def test_get_peft_config():
    for get in (pyadapt.get_peft_config, pyadapt.get_pet_config):
        for key in ("peft_type", "pet_type"):
            assert get({key: "LORA", "r": 3}) == LoraConfig(r=3)
