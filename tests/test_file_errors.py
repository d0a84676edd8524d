"""Files that do not fit: one error that says all of it, and a model that stays as it was."""

from __future__ import annotations

import json
import os
import pickle
import stat

import pytest
import torch
from models import build, model_batch, plain_module, snapshot
from safetensors.torch import load_file, save_file

import pyadapt
from pyadapt import AdapterFileError, LoraConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture
def folder(tmp_path):
    """A good adapter folder for the tiny Llama."""
    pyadapt.wrap(build("llama"), LoraConfig(r=4, init_lora_weights=False)).save_pretrained(tmp_path)
    return tmp_path


def refused(path, match, model=None, error=AdapterFileError, **options):
    """Loading raises one clear error, for a plain model and for a wrapped one, and changes neither."""
    for each in [model] if model is not None else [build("llama"), pyadapt.wrap(build("llama"), LoraConfig())]:
        before = snapshot(each)
        was_wrapped = pyadapt.is_wrapped(each)
        with pytest.raises(error, match=match) as caught:
            pyadapt.load(each, path, "new", **options)
        assert snapshot(each) == before
        assert pyadapt.is_wrapped(each) is was_wrapped
    return str(caught.value)


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def spoil(tensors):
    del tensors[Q0 + "lora_A.weight"]
    del tensors[Q0 + "lora_B.weight"]
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 24)
    key = Q0.replace("q_proj", "v_proj") + "lora_B.weight"
    tensors[key] = torch.zeros(24, 4)


def test_all_that_is_wrong_is_listed_in_one_error(folder):
    edit(folder, spoil)
    text = refused(folder, "does not fit this LlamaForCausalLM")
    assert f"missing:   {Q0}lora_A.weight (4, 24)" in text
    assert f"missing:   {Q0}lora_B.weight (24, 4)" in text
    assert "extra:     base_model.model.lm_head.lora_A.weight (4, 24)" in text
    assert "misshapen: " in text
    assert "is (24, 4), the model needs (12, 4)" in text
    assert len(text.splitlines()) == 5


def test_not_strict_takes_what_fits(folder):
    before = load_file(folder / WEIGHTS)
    edit(folder, spoil)
    edit_config(folder, init_lora_weights=True)
    model = pyadapt.load(build("llama"), folder, strict=False)
    after = {f"base_model.model.{key}": value for key, value in model.get_adapter_state_dict().items()}
    assert before.keys() == after.keys()
    untouched = [key for key in before if "layers.1." in key]
    assert len(untouched) == 4
    assert all(torch.equal(before[key], after[key]) for key in untouched)
    # What was missing is as a fresh adapter has it: no effect.
    assert not after[Q0 + "lora_B.weight"].any()
    assert not after[Q0.replace("q_proj", "v_proj") + "lora_B.weight"].any()


@pytest.mark.parametrize("size", [0, 4, 100, 1000, -1])
def test_truncated(folder, size):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:size])
    refused(folder, "adapter_model.safetensors is damaged or of another format")


@pytest.mark.parametrize("content", [b"\x00" * 64, b"\xff" * 64, b"{}", b"<html>not found</html>" * 40], ids=range(4))
def test_foreign(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "adapter_model.safetensors is damaged or of another format")


class Exploit:
    """What a malicious pickle looks like."""

    def __reduce__(self):
        return os.mkdir, (os.environ["PYADAPT_TEST_EXPLOIT"],)


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(folder, monkeypatch, modern):
    target = folder / "exploited"
    monkeypatch.setenv("PYADAPT_TEST_EXPLOIT", os.fspath(target))
    os.remove(folder / WEIGHTS)
    if modern:
        torch.save({"weight": Exploit()}, folder / "adapter_model.bin")
    else:
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Exploit()))
    refused(folder, "adapter_model.bin is damaged or of another format")
    assert not target.exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"a": 3}, {3: torch.zeros(2)}], ids=range(4))
def test_a_pickle_that_is_no_state_dict(folder, content):
    os.remove(folder / WEIGHTS)
    torch.save(content, folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin is damaged or of another format")


def test_weights_of_another_model(folder):
    pyadapt.wrap(build("bert"), LoraConfig(target_modules=["query"])).save_pretrained(folder / "bert")
    refused(folder / "bert", "no module is named 'query'")


def test_nothing_there(tmp_path):
    refused(tmp_path / "missing", "there is no folder")
    refused(tmp_path, "has no adapter_config.json")
    refused("./missing", "there is no folder")


def test_a_hub_name_without_a_hub():
    refused("nobody/nothing", "there is no folder nobody/nothing")


def test_no_weights(folder):
    os.remove(folder / WEIGHTS)
    refused(folder, "holds neither adapter_model.safetensors nor adapter_model.bin")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00\x01", '{"peft_type": "LORA",}'], ids=range(6))
def test_config_is_no_json(folder, text):
    (folder / CONFIG).write_text(text)
    message = refused(folder, CONFIG, error=ValueError)
    assert "JSON" in message or "not a mapping" in message


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "UNHEARD_OF"}, "peft_type 'UNHEARD_OF' is not one of"),
        ({"r": 0}, "r=0"),
        ({"r": "8"}, "r='8'"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"lora_rank": 3}, "no key 'lora_rank'"),
        ({"task_type": "SING"}, "task_type='SING'"),
        ({"target_modules": ["nowhere"]}, "no module is named 'nowhere'"),
        ({"target_modules": []}, "target_modules"),
        ({"r": 5}, "misshapen"),
    ],
    ids=str,
)
def test_config_that_cannot_be(folder, changes, match):
    edit_config(folder, **changes)
    refused(folder, match, error=ValueError)


def test_config_without_a_method(folder):
    (folder / CONFIG).write_text("{}")
    refused(folder, "no peft_type", error=ValueError)


def test_nan_in_the_file_is_loaded_as_it_is(folder):
    """A checkpoint may hold a diverged adapter; looking at it must be possible, merging it is refused."""
    key = Q0.replace("q_proj", "v_proj") + "lora_B.weight"
    edit(folder, lambda tensors: tensors[key].fill_(float("nan")))
    model = pyadapt.load(build("llama"), folder)
    assert torch.isnan(model(**model_batch("llama")).logits).any()
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter()


# --- writing ----------------------------------------------------------------------------------


def test_a_failing_write_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    import safetensors.torch

    model = pyadapt.load(build("llama"), folder, is_trainable=True)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    real = safetensors.torch.save_file

    def dies_halfway(tensors, filename, **options):
        real(tensors, filename, **options)
        with open(filename, "r+b") as file:
            file.truncate(100)
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", dies_halfway)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_a_failing_replace_leaves_no_temporary_file(tmp_path, monkeypatch):
    from pyadapt.files import write_text

    write_text(tmp_path / "a", "old")

    def fails(*args):
        raise OSError("busy")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="busy"):
        write_text(tmp_path / "a", "new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_permissions_follow_the_umask(folder):
    (folder / "plain").write_text("")
    wanted = stat.S_IMODE((folder / "plain").stat().st_mode)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in (WEIGHTS, CONFIG, "README.md")} == {wanted}


def test_a_model_card_is_not_overwritten(folder):
    (folder / "README.md").write_text("mine")
    pyadapt.load(build("llama"), folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_saving_over_a_file_is_refused(tmp_path):
    model = pyadapt.wrap(build("llama"), LoraConfig())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_tensors_without_values_are_not_saved(tmp_path):
    with torch.device("meta"):
        model = plain_module()
    pyadapt.wrap(model, LoraConfig(target_modules=["encoder.0"]))
    with pytest.raises(AdapterFileError, match="on the meta device"):
        model.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_gathered_state_dict_that_lacks_something(tmp_path):
    model = pyadapt.wrap(build("llama"), LoraConfig())
    with pytest.raises(AdapterFileError, match=r"lacks model\.layers\.0"):
        model.save_pretrained(tmp_path, state_dict={"other": torch.ones(1)})
    with pytest.raises(AdapterFileError, match=r"on rank 0, is empty.*stage3_gather_16bit_weights_on_model_save"):
        model.save_pretrained(tmp_path, state_dict={})
    assert not (tmp_path / WEIGHTS).exists()


def test_a_model_whose_load_failed_can_be_loaded_again(folder):
    model = build("llama")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-5])
    with pytest.raises(AdapterFileError):
        pyadapt.load(model, folder)
    (folder / WEIGHTS).write_bytes(whole)
    assert pyadapt.load(model, folder) is model
