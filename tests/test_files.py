"""Adapter folders: the ones that peft writes and reads, byte for byte the same from the same configuration."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from models import ALL, FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_twin, plain_module
from safetensors import safe_open
from safetensors.torch import load_file

import pyadapt
from pyadapt import LoraConfig

# Options of every kind that change keys, shapes or scalings.
VARIANTS = {
    "default": {},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {"r": 6, "rank_pattern": {"first": 3}, "alpha_pattern": {"first": 5}, "use_rslora": True},
    "one block": {"layers_to_transform": [1]},
    "head": {"modules_to_save": ["head"]},
}


def config_of(name, variant):
    """Keyword arguments for LoraConfig of either library, with the family's own names put in."""
    family = FAMILIES[name]
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": list(family.targets),
        "task_type": family.task,
        **VARIANTS[variant],
    }
    for option in ("rank_pattern", "alpha_pattern"):
        if option in config:
            config[option] = {family.targets[0]: config[option]["first"]}
    if variant == "head":
        config["modules_to_save"] = [family.head or "lm_head"]
    return config


CASES = [
    (name, variant)
    for name in ALL
    for variant in VARIANTS
    if not (variant == "head" and name in ("gpt2", "t5"))  # tied to the embedding: see test_merge.py
]


def wrapped(name, variant="default", **config):
    return pyadapt.wrap(build(name), LoraConfig(init_lora_weights=False, **config_of(name, variant), **config))


def quietly(function, *args, **kwargs):
    """Call peft without what it says of base models that have no config file, and of each Conv1D."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return function(*args, **kwargs)


def keys_and_shapes(path):
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_ours_into_peft(name, variant, tmp_path):
    import peft

    model = wrapped(name, variant)
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(build(name), tmp_path)
    batch = model_batch(name)
    assert_near(model(**batch).logits, twin.eval()(**batch).logits, "model")


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_peft_into_ours(name, variant, tmp_path):
    twin = peft_twin(build(name), init_lora_weights=False, **config_of(name, variant)).eval()
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.3)
    quietly(twin.save_pretrained, tmp_path)
    model = pyadapt.load(build(name), tmp_path)
    batch = model_batch(name)
    assert_near(model(**batch).logits, twin(**batch).logits, "model")


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_keys_shapes_and_config_are_those_that_peft_writes(name, variant, tmp_path):
    model = build(name)
    twin = peft_twin(model, **config_of(name, variant))
    quietly(twin.save_pretrained, tmp_path / "peft")
    pyadapt.wrap(model, LoraConfig(**config_of(name, variant))).save_pretrained(tmp_path / "ours")
    ours, theirs = (keys_and_shapes(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "peft"))
    assert ours == theirs
    ours, theirs = (json.loads((tmp_path / which / "adapter_config.json").read_text()) for which in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    for config in (ours, theirs):
        # peft writes these in any order, heads twice where the user names them too, and heads that are not there.
        config["target_modules"] = sorted(config["target_modules"])
        heads = config["modules_to_save"]
        config["modules_to_save"] = heads and sorted({head for head in heads if hasattr(model, head)})
    assert pyadapt.plan(build(name), ours).layers == pyadapt.plan(build(name), theirs).layers
    if variant == "all-linear":
        # The same layers, which the two write differently: as short or as full names.
        del ours["target_modules"], theirs["target_modules"]
    assert ours == theirs


def test_round_trip_is_exact(tmp_path):
    model = wrapped("bert")
    model.save_pretrained(tmp_path)
    again = pyadapt.load(build("bert"), tmp_path)
    for key, value in model.get_adapter_state_dict().items():
        assert torch.equal(again.get_adapter_state_dict()[key], value)
    assert again.peft_config["default"].inference_mode
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training
    trainable = pyadapt.load(build("bert").train(), tmp_path, is_trainable=True)
    assert trainable.training
    assert any(p.requires_grad for p in trainable.parameters())


def test_only_megabytes_are_written(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == values


def test_the_same_config_gives_the_same_bytes(tmp_path):
    # Sets have another order in each process; here the two orders stand for that.
    for folder, targets in (("a", {"v_proj", "q_proj", "up_proj"}), ("b", {"up_proj", "q_proj", "v_proj"})):
        torch.manual_seed(0)
        model = pyadapt.wrap(build("llama"), LoraConfig(target_modules=targets, init_lora_weights=False))
        model.save_pretrained(tmp_path / folder)
        model.save_pretrained(tmp_path / folder)
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_inference_mode_is_written_true_and_the_live_config_is_not(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is False


def test_several_adapters_and_other_names(tmp_path):
    import peft

    model = wrapped("llama")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "second"]
    assert not any(
        "default" in key or "second" in key for key in load_file(tmp_path / "second" / "adapter_model.safetensors")
    )
    batch = model_batch("llama")
    twin = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    twin.load_adapter(os.fspath(tmp_path / "second"), "second")
    again = pyadapt.load(build("llama"), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        for each in (model, again, twin):
            each.set_adapter(name)
        assert_near(model(**batch).logits, twin(**batch).logits, "model")
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_selected_adapters(tmp_path):
    model = wrapped("llama")
    model.add_adapter("second", LoraConfig(r=2))
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert os.listdir(tmp_path) == ["second"]
    with pytest.raises(ValueError, match="'third'"):
        model.save_pretrained(tmp_path, selected_adapters=["third"])


def test_other_name_from_peft(tmp_path):
    twin = peft_twin(build("llama"), "mine", target_modules=["q_proj"], init_lora_weights=False).eval()
    quietly(twin.save_pretrained, tmp_path)
    model = pyadapt.load(build("llama"), tmp_path / "mine", adapter_name="other")
    assert list(model.peft_config) == ["other"]
    batch = model_batch("llama")
    assert_near(model(**batch).logits, twin(**batch).logits, "model")


def test_transformers_reads_our_folder(tmp_path):
    """Its own adapter loading, which goes through peft."""
    model = wrapped("llama")
    model.save_pretrained(tmp_path)
    plain = build("llama")
    plain.load_adapter(os.fspath(tmp_path))
    batch = model_batch("llama")
    assert_near(plain.eval()(**batch).logits, model(**batch).logits, "model")


def test_transformers_from_pretrained_of_base_and_adapter(tmp_path):
    from transformers import AutoModelForCausalLM

    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = pyadapt.wrap(base, LoraConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == os.fspath(tmp_path / "base")
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    batch = model_batch("llama")
    assert_near(both.eval()(**batch).logits, model.eval()(**batch).logits, "model")


def test_plain_module_round_trip_with_peft(tmp_path):
    import peft

    model = pyadapt.wrap(
        plain_module(),
        LoraConfig(target_modules=["encoder.0"], modules_to_save=["classifier"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 7)
    assert_near(model(x), peft.PeftModel.from_pretrained(plain_module(), tmp_path)(x), "model")
    assert torch.equal(model(x), pyadapt.load(plain_module(), tmp_path)(x))


def test_a_gathered_state_dict_can_be_given(tmp_path):
    """What an engine that shards weights hands to save_pretrained."""
    model = wrapped("llama")
    gathered = {key: value.clone() + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in model.get_adapter_state_dict().items():
        assert torch.equal(saved[f"base_model.model.{key}"], value + 1)
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()


def test_get_adapter_state_dict():
    model = wrapped("bert")
    twin = peft_twin(build("bert"), **config_of("bert", "default"))
    copy_adapter_to_peft(model, twin)
    keys = model.get_adapter_state_dict().keys()
    assert "classifier.weight" in keys
    assert "bert.encoder.layer.0.attention.self.query.lora_A.weight" in keys
    with pytest.raises(ValueError, match="'none'"):
        model.get_adapter_state_dict("none")


def test_bin_files_are_read(tmp_path):
    """The older format of peft: a pickle, of which only tensors are let in."""
    model = wrapped("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    os.remove(tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    batch = model_batch("llama")
    assert torch.equal(pyadapt.load(build("llama"), tmp_path)(**batch).logits, model(**batch).logits)


def test_a_minimal_config_of_another_tool(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path)
    minimal = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(minimal))
    batch = model_batch("llama")
    assert torch.equal(pyadapt.load(build("llama"), tmp_path)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "options", [{"peft_type": "LORA", "target_modules": ["q_lin"]}, {"peft_type": "PROMPT_TUNING"}]
)
def test_a_layer_in_front_of_a_head_is_trained_with_it(options, tmp_path):
    """DistilBERT's pre_classifier, in both directions."""
    import peft
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    if options["peft_type"] == "PROMPT_TUNING":
        options = {**options, "num_virtual_tokens": 3}
    sizes = {"vocab_size": 50, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}

    def base():
        torch.manual_seed(0)
        return DistilBertForSequenceClassification(DistilBertConfig(**sizes)).eval()

    model = pyadapt.wrap(base(), {**options, "task_type": "SEQ_CLS"}).eval()
    assert model.pre_classifier.copies["default"].weight.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.tensor([[3, 4, 5, 6]])
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert_near(theirs(input_ids=ids).logits, expected, "model")
        theirs.save_pretrained(tmp_path / "theirs")
        loaded = pyadapt.load(base(), tmp_path / "theirs")
        assert_near(loaded(input_ids=ids).logits, expected, "model")
