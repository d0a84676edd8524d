"""Prompt adapters in files and state dicts, which are PEFT's: written, read, trained on from; swapped."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from models import assert_near, build, snapshot
from prompt_life_cases import (
    CASES,
    MADE,
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
from safetensors.torch import load_file

import pyadapt

EVERY = pytest.mark.parametrize("method", METHODS)
CASE = pytest.mark.parametrize(("method", "family"), CASES)
# What a file holds, beside modules that are trained whole.
KEYS = {method: {"prompt_embeddings"} for method in PROMPTS}
KEYS["multitask"] = {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}


def assert_same(found, expected, low_cpu_mem_usage):
    """Bit for bit; but a product with what lies in a file's memory, at odd places, may round otherwise."""
    if low_cpu_mem_usage:
        assert_near(found, expected, "model")
    else:
        assert torch.equal(found, expected)


@CASE
def test_a_file_holds_the_finished_prompt_alone(method, family, tmp_path):
    model = wrapped(method, family)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    head = {"base_model.classifier.weight", "base_model.classifier.bias"} if family == "bert" else set()
    if method == "llama-adapter":
        assert len(held) == 4
        assert all(key.endswith((".adaption_prompt", ".adaption_gate")) for key in held)
    else:
        assert held.keys() == KEYS[method] | head
    assert all(value.dtype == torch.float32 for value in held.values())
    for folder in (tmp_path / "again", tmp_path / "once more"):
        pyadapt.load(build(family), tmp_path).save_pretrained(folder)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


@CASE
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_to_serve(method, family, low_cpu_mem_usage, tmp_path):
    model, batch = wrapped(method, family), batch_of(method, family)
    model.save_pretrained(tmp_path)
    loaded = pyadapt.load(build(family).train(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(output(loaded, batch), output(model, batch), low_cpu_mem_usage)
    assert trained(loaded) == []
    assert not loaded.training
    assert loaded.peft_config["default"].inference_mode


@CASE
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_trained_on_from_a_file(method, family, low_cpu_mem_usage, tmp_path):
    """What made a prompt is not in the file: then the prompt itself is trained."""
    model, batch = wrapped(method, family), batch_of(method, family)
    model.save_pretrained(tmp_path / "first")
    again = pyadapt.load(build(family), tmp_path / "first", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    before = output(again, batch)
    assert_same(before, output(model, batch), low_cpu_mem_usage)
    own = [name for name in trained(again) if ".copies." not in name]
    assert len(own) == {"llama-adapter": 4, "multitask": 3}.get(method, 1)
    optimizer = torch.optim.Adam([p for p in again.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(5):
        losses.append(step(again.train(), batch)[0])
        optimizer.step()
    assert losses[-1] < losses[0]
    again.eval().save_pretrained(tmp_path / "second")
    third = pyadapt.load(build(family), tmp_path / "second")
    assert_same(output(third, batch), output(again, batch), low_cpu_mem_usage)
    assert not torch.equal(output(third, batch), before)


@CASE
def test_state_dicts_have_the_keys_and_values_of_peft(method, family, tmp_path):
    """Given, and taken back; a prompt that something made is finished from then on."""
    model, batch = wrapped(method, family), batch_of(method, family)
    values = {key: value.detach().clone() for key, value in pyadapt.get_peft_model_state_dict(model).items()}
    assert model.get_adapter_state_dict().keys() == {key.removeprefix("base_model.model.") for key in values}
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert held.keys() == values.keys()
    assert all(torch.equal(held[key], value) for key, value in values.items())
    other = wrapped(method, family, seed=1)
    assert not torch.equal(output(other, batch), output(model, batch))
    pyadapt.set_peft_model_state_dict(other, values)
    assert torch.equal(output(other, batch), output(model, batch))
    _, found = step(other.train(), batch)
    assert sorted(found) == sorted(trained(other))
    again = pyadapt.get_peft_model_state_dict(other)
    assert all(torch.equal(again[key], value) for key, value in values.items())
    if (method, family) != ("llama-adapter", "t5"):
        twin = peft.PeftModel.from_pretrained(build(family), tmp_path)
        theirs = peft.get_peft_model_state_dict(twin)
        assert theirs.keys() == values.keys()
        assert all(torch.equal(theirs[key], value) for key, value in values.items())


@EVERY
def test_state_dicts_that_do_not_fit_change_nothing(method):
    model = wrapped(method)
    values = pyadapt.get_peft_model_state_dict(model)
    before = snapshot(model)
    key = next(iter(values))
    wrong = {
        "missing": {name: value for name, value in values.items() if name != key},
        "extra": {**values, "base_model.model.other": torch.zeros(2)},
        "misshapen|has shape|needs": {**values, key: torch.zeros(2, 3, 5)},
    }
    for message, tensors in wrong.items():
        with pytest.raises(pyadapt.AdapterFileError, match=message):
            pyadapt.set_peft_model_state_dict(model, tensors)
        assert snapshot(model) == before


@CASE
def test_several_adapters_in_one_folder(method, family, tmp_path):
    model, batch = wrapped(method, family), batch_of(method, family)
    model.add_adapter("other", config_of(method, family, **({"adapter_len": 2} if method == "llama-adapter" else {})))
    stir(model, "other", seed=5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
    loaded = pyadapt.load(build(family), tmp_path)
    loaded.load_adapter(tmp_path / "other", "second")
    for ours, theirs in (("default", "default"), ("second", "other")):
        loaded.set_adapter(ours)
        model.set_adapter(theirs)
        assert torch.equal(output(loaded, batch), output(model, batch))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / "adapter_model.safetensors").exists()


@EVERY
def test_a_base_without_values_yet(method, tmp_path):
    """Wrapped and counted on the meta device; from a file the adapter keeps its values."""
    model, batch = wrapped(method), batch_of(method)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = build("llama")
    bare = pyadapt.wrap(copy.deepcopy(empty), config_of(method))
    assert bare.get_nb_trainable_parameters() == wrapped(method).get_nb_trainable_parameters()
    with pytest.raises(pyadapt.AdapterFileError, match="low_cpu_mem_usage"):
        pyadapt.load(copy.deepcopy(empty), tmp_path)
    loaded = pyadapt.load(empty, tmp_path, low_cpu_mem_usage=True)
    loaded.load_state_dict(build("llama").state_dict(), strict=False, assign=True)
    # Computed from the configuration, and in no state dict.
    loaded.model.rotary_emb.inv_freq = build("llama").model.rotary_emb.inv_freq
    assert_near(output(loaded, batch), output(model, batch), "model")


@CASE
def test_swapping_another_prompt_in(method, family, tmp_path):
    """In place where it is as long, and nothing has to be made; else loaded anew under the same name."""
    batch = batch_of(method, family)
    length = "adapter_len" if method == "llama-adapter" else "num_virtual_tokens"
    other = wrapped(method, family, seed=1)
    other.save_pretrained(tmp_path / "same")
    longer = wrapped(method, family, seed=2, **{length: TOKENS + 1})
    longer.save_pretrained(tmp_path / "longer")
    model = wrapped(method, family)
    held = {name: id(parameter) for name, parameter in model.named_parameters()}
    fitted = model.hotswap_adapter(tmp_path / "same")
    assert fitted == (method not in MADE)
    assert torch.equal(output(model, batch), output(other, batch))
    if fitted:
        assert held == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert trained(model)
    assert model.hotswap_adapter(tmp_path / "same")
    assert not model.hotswap_adapter(tmp_path / "longer")
    assert torch.equal(output(model, batch), output(longer, batch))
    assert model.active_adapters == ["default"]


@CASE
def test_names_of_peft(method, family, tmp_path):
    batch = batch_of(method, family)
    torch.manual_seed(0)
    model = stir(pyadapt.get_peft_model(build(family), config_of(method, family)))
    assert isinstance(model, pyadapt.PeftModel)
    assert torch.equal(output(model, batch), output(wrapped(method, family), batch))
    model.save_pretrained(tmp_path)
    loaded = pyadapt.PeftModel.from_pretrained(build(family), tmp_path)
    assert torch.equal(output(loaded, batch), output(model, batch))
    values = {"pet_type": METHODS[method]["peft_type"], **config_of(method, family).to_dict()}
    del values["peft_type"]
    assert pyadapt.get_pet_config(values) == config_of(method, family)
    torch.manual_seed(0)
    again = stir(pyadapt.get_pet_model(build(family), values))
    assert torch.equal(output(again, batch), output(model, batch))


@pytest.mark.parametrize(("method", "family"), [case for case in CASES if case[1] in ("llama", "bert")])
def test_base_and_adapter_from_the_folder_alone(method, family, tmp_path):
    build(family).save_pretrained(tmp_path / "base")
    base = type(build(family)).from_pretrained(tmp_path / "base").eval()
    model = wrapped(method, family, base=base)
    model.save_pretrained(tmp_path / "adapter")
    task = {"llama": "ForCausalLM", "bert": "ForSequenceClassification"}[family]
    for name in ("AutoPeftModel", f"AutoPeftModel{task}"):
        loaded = getattr(pyadapt, name).from_pretrained(tmp_path / "adapter")
        assert torch.equal(output(loaded, batch_of(method, family)), output(model, batch_of(method, family)))


@EVERY
def test_a_module_of_choice_is_in_the_file(method, tmp_path):
    model = wrapped(method, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.lm_head.weight" if method == "llama-adapter" else "base_model.lm_head.weight"
    assert torch.equal(held[key], model.lm_head.copies["default"].weight)
    loaded = pyadapt.load(build("llama"), tmp_path)
    assert torch.equal(output(loaded, batch_of(method)), output(model, batch_of(method)))


def test_the_output_of_peft_after_its_values_are_set():
    """P-tuning in training: ours trains the finished prompt, which gives what peft's gives when it serves."""
    twin = peft.get_peft_model(
        build("llama"),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=8),
    )
    model = wrapped("P-tuning")
    batch = batch_of("P-tuning")
    values = {key: value.detach().clone() for key, value in peft.get_peft_model_state_dict(twin).items()}
    pyadapt.set_peft_model_state_dict(model, values)
    with torch.no_grad():
        expected = twin.eval()(**batch).logits[:, TOKENS:]
    assert_near(output(model, batch), expected, "model")
