"""IA3: its configuration, what it adapts when that is not said, training and files, against peft."""

from __future__ import annotations

import json
import logging

import peft
import pytest
import torch
from ia3_cases import assert_gradients_equal, options_of, pair, quietly, train, twin_of, wrapped
from models import ALL, FAMILIES, assert_near, build, diffusion, model_batch, plain_module, snapshot
from peft.utils import constants
from safetensors.torch import load_file, save_file
from torch import nn

import pyadapt
from pyadapt import AdapterFileError, IA3Config
from pyadapt.config import as_config
from pyadapt.layer import adapted_layers
from pyadapt.methods.ia3.defaults import DEFAULT_FEEDFORWARD, DEFAULT_TARGETS

VALUES = {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"], "modules_to_save": ["lm_head"]}


# --- configuration ---------------------------------------------------------------------------


def test_every_key_that_peft_writes():
    ours, theirs = IA3Config(**VALUES).to_dict(), peft.IA3Config(**VALUES).to_dict()
    assert ours.keys() == theirs.keys()
    assert IA3Config().to_dict().items() >= {"init_ia3_weights": True, "feedforward_modules": None}.items()


def test_from_peft_and_files(tmp_path):
    config = IA3Config(**VALUES)
    assert as_config(peft.IA3Config(**VALUES)) == config
    config.save_pretrained(tmp_path)
    assert as_config(peft.PeftConfig.from_pretrained(tmp_path)) == config.replaced(inference_mode=True)
    assert as_config({"peft_type": "IA3", **VALUES}) == config
    assert IA3Config(target_modules={"v", "k"}, feedforward_modules=("v",)).feedforward_modules == ["v"]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"feedforward_module": ["wo"]}, "did you mean 'feedforward_modules'"),
        ({"r": 8}, "IA3Config has no key 'r'"),
        ({"target_modules": ["k"], "feedforward_modules": ["wo", "wi"]}, "feedforward_modules names 'wo', 'wi', which"),
        ({"feedforward_modules": "("}, r"feedforward_modules='\(' is no regular expression"),
    ],
)
def test_bad_options(values, match):
    with pytest.raises(ValueError, match=match):
        as_config({"peft_type": "IA3", **values})


# --- what is adapted -------------------------------------------------------------------------


def test_the_tables_are_those_of_peft():
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert {key: sorted(value) for key, value in targets.items()} == DEFAULT_TARGETS
    assert constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING == DEFAULT_FEEDFORWARD


def inputs_of(model):
    return [path for path, layer in adapted_layers(model) if layer.unit("default").feedforward]


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("vit", "olmo")])
def test_defaults_are_those_of_peft(name):
    model = wrapped(name)
    twin = quietly(peft.get_peft_model, build(name), peft.IA3Config(task_type=FAMILIES[name].task))
    ours, theirs = model.peft_config["default"], twin.peft_config["default"]
    assert set(ours.target_modules) == set(theirs.target_modules)
    assert set(ours.feedforward_modules) == set(theirs.feedforward_modules)
    found = {path: layer for path, layer in twin.base_model.model.named_modules() if hasattr(layer, "is_feedforward")}
    assert [path for path, _ in adapted_layers(model)] == list(found)
    assert inputs_of(model) == [path for path, layer in found.items() if layer.is_feedforward]


@pytest.mark.parametrize(("name", "last"), [("olmo", "down_proj"), ("vit", "fc2")])
def test_by_structure(name, last, caplog):
    """peft refuses a model of no known type."""
    model = pyadapt.wrap(build(name), IA3Config())
    config = model.peft_config["default"]
    assert config.target_modules == sorted(["k_proj", "v_proj", last])
    assert config.feedforward_modules == [last]
    assert "target_modules not given and" in caplog.text
    assert "feedforward_modules not given and" in caplog.text


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"qkv": nn.Linear(4, 12), "out": nn.Linear(4, 4)})
        self.ff = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.out = nn.Linear(4, 4)


def test_by_structure_with_names_that_mean_more(caplog):
    """Names are as long as it takes to mean no other layer: "out" would be one beside the attention as well."""
    config = pyadapt.plan(nn.Sequential(Block(), Block()), IA3Config()).config
    assert config.target_modules == ["attention.out", "attention.qkv", "ff.2"]
    assert config.feedforward_modules == ["ff.2"]


def test_by_structure_where_a_list_of_whole_blocks_is_called_attentions():
    """diffusers' name; only what its feed-forward modules are in is no attention."""
    config = pyadapt.plan(diffusion.unet(), IA3Config()).config
    assert config.target_modules == ["net.2", "to_k", "to_v"]
    assert config.feedforward_modules == ["net.2"]


def test_nothing_to_choose_by_structure():
    model = plain_module()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no default targets for PlainNet.*name the layers in target_modules"):
        pyadapt.wrap(model, IA3Config())
    assert snapshot(model) == before


def test_targets_without_feedforward_modules(caplog):
    """The table's names that are among them; peft writes all of them, and cannot read its file any more."""
    config = pyadapt.plan(build("llama"), IA3Config(target_modules=["k_proj", "up_proj"])).config
    assert config.feedforward_modules == []
    config = pyadapt.plan(build("llama"), IA3Config(target_modules=["k_proj", "down_proj"])).config
    assert config.feedforward_modules == ["down_proj"]
    with caplog.at_level(logging.WARNING):
        config = pyadapt.plan(plain_module(), IA3Config(target_modules=["encoder.0"])).config
    assert config.feedforward_modules == []
    assert "feedforward_modules not given and PlainNet is in no table: chose [] by structure" in caplog.text


def test_targets_that_mean_more_than_a_feedforward_name(tmp_path):
    """`c_proj` is in the attention as well; peft scales the MLP's input by its table, and cannot read that file."""
    model = wrapped("gpt2", target_modules=["c_proj"])
    assert inputs_of(model) == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    twin = twin_of(model, build("gpt2"), target_modules=["c_proj"], task_type="CAUSAL_LM")
    batch = model_batch("gpt2")
    assert_near(model(**batch).logits, twin(**batch).logits, "model")
    model.save_pretrained(tmp_path)
    again = quietly(peft.PeftModel.from_pretrained, build("gpt2"), tmp_path).eval()
    assert_near(again(**batch).logits, model(**batch).logits, "model")
    quietly(twin.save_pretrained, tmp_path / "peft")
    with pytest.raises(ValueError, match="subset"):
        peft.PeftModel.from_pretrained(build("gpt2"), tmp_path / "peft")


def test_all_linear(tmp_path):
    model = wrapped("llama", target_modules="all-linear")
    assert len(adapted_layers(model)) == 14
    assert inputs_of(model) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    batch = model_batch("llama")
    assert_near(model(**batch).logits, twin(**batch).logits, "model")


class Dotless(nn.Module):
    """Two targets of which one ends like the other's name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wo, self.two = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.two(self.wo(x))


def test_the_dot_boundary(tmp_path):
    """peft takes `two` for a feed-forward layer by the name `wo`. Our file says it so that peft means the same."""
    options = {"target_modules": ["wo", "two"], "feedforward_modules": ["wo"]}
    model = pyadapt.wrap(Dotless(), IA3Config(init_ia3_weights=False, **options))
    assert inputs_of(model) == ["wo"]
    model.save_pretrained(tmp_path / "ours")
    x = torch.randn(4, 5)
    twin = peft.PeftModel.from_pretrained(Dotless(), tmp_path / "ours")
    assert_near(twin(x), model(x), "layer")
    theirs = peft.get_peft_model(Dotless(), peft.IA3Config(init_ia3_weights=False, **options))
    assert theirs.base_model.model.two.is_feedforward
    # A file that peft has made in its own way is read as it was meant there.
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = pyadapt.load(Dotless(), tmp_path / "theirs")
    assert inputs_of(loaded) == ["wo", "two"]
    assert_near(loaded(x), theirs(x), "layer")


def test_an_expression_for_feedforward_modules(caplog):
    model = wrapped("llama", target_modules=r".*\.(k_proj|down_proj)", feedforward_modules=r".*\.1\..*down_proj")
    assert inputs_of(model) == ["model.layers.1.mlp.down_proj"]
    pyadapt.plan(build("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=".*nothing"))
    assert "matches none of the 2 adapted layers" in caplog.text


def test_feedforward_modules_outside_the_default_targets():
    with pytest.raises(ValueError, match="feedforward_modules names 'up_proj', which target_modules does not"):
        pyadapt.wrap(build("llama"), IA3Config(feedforward_modules=["up_proj"]))


def test_a_tied_head_is_refused_alone():
    model = build("gpt2")
    before = snapshot(model)
    with pytest.raises(ValueError, match="lm_head would be adapted, but its weight is also that of") as error:
        pyadapt.wrap(model, IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    # An option that IA3 does not have is no way out.
    assert "ensure_weight_tying" not in str(error.value)
    assert snapshot(model) == before


def test_plan():
    plan = pyadapt.plan(build("llama"), IA3Config())
    rows = {row.path.rpartition(".")[2]: row for row in plan.layers}
    assert rows["k_proj"].shapes == {"ia3_l": (12, 1)}
    assert rows["down_proj"].shapes == {"ia3_l": (1, 36)}
    assert plan.trainable_parameters == 2 * (12 + 12 + 36)
    assert {row.kernel for row in plan.layers} <= {"fused", "skinny", "library", "reference"}
    assert {row.rank for row in plan.layers} == {0}


# --- training --------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing():
    batch = model_batch("llama")
    model = pyadapt.wrap(build("llama"), IA3Config())
    assert_near(model(**batch).logits, build("llama")(**batch).logits, "model")
    assert all(bool((value == 1).all()) for value in model.get_adapter_state_dict().values())
    random = pyadapt.wrap(build("llama"), IA3Config(init_ia3_weights=False)).get_adapter_state_dict().values()
    assert 0.7 < torch.cat([value.flatten() for value in random]).std() < 1.3


@pytest.mark.parametrize("name", ALL)
def test_gradients_equal_those_of_peft(name):
    model, twin = pair(name)
    assert_gradients_equal(model, twin, model_batch(name))


@pytest.mark.parametrize("name", ALL)
def test_losses_equal_those_of_peft_step_by_step(name):
    model, twin = pair(name)
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    batches = [model_batch(name, seed) for seed in range(6)]
    ours, theirs = train(model, batches), train(twin, batches)
    assert_near(ours, theirs, "loss")
    assert all(torch.equal(model.get_parameter(key), value) for key, value in frozen.items())


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_files_go_both_ways(name, tmp_path):
    model = wrapped(name)
    batch = model_batch(name)
    model.save_pretrained(tmp_path / "ours")
    twin = quietly(peft.PeftModel.from_pretrained, build(name), tmp_path / "ours").eval()
    assert_near(twin(**batch).logits, model(**batch).logits, "model")
    quietly(twin.save_pretrained, tmp_path / "theirs")
    loaded = pyadapt.load(build(name), tmp_path / "theirs")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_the_config_is_what_peft_writes(name, tmp_path):
    wrapped(name).save_pretrained(tmp_path / "ours")
    twin = quietly(peft.get_peft_model, build(name), peft.IA3Config(**options_of(name)))
    quietly(twin.save_pretrained, tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / which / "adapter_config.json").read_text()) for which in ("ours", "theirs"))
    for config in (ours, theirs):
        config["target_modules"].sort()
        if config["modules_to_save"]:
            # peft writes both usual names of a head, wherever it is.
            config["modules_to_save"] = [head for head in config["modules_to_save"] if head == "classifier"]
        config["base_model_name_or_path"] = None
    assert ours == theirs


def test_a_file_for_the_other_side(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value.t().contiguous() for key, value in load_file(file).items()}, file, {"format": "pt"})
    plain = build("llama")
    before = snapshot(plain)
    with pytest.raises(AdapterFileError, match=r"down_proj.ia3_l.*\(36, 1\)"):
        pyadapt.load(plain, tmp_path)
    assert snapshot(plain) == before


def test_only_lora_is_saved_as_plain_lora(tmp_path):
    with pytest.raises(ValueError, match="is of type IA3; only LoRA can be saved as plain LoRA"):
        wrapped("llama").save_pretrained(tmp_path, as_plain_lora=True)
