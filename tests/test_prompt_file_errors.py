"""Files of prompt methods that do not fit: one error that lists what is wrong, and a model that is what it was."""

from __future__ import annotations

import json

import pytest
import torch
from models import build, snapshot
from prompt_life_cases import CASES, METHODS, TOKENS, wrapped
from safetensors.torch import load_file, save_file

import pyadapt
from pyadapt import AdapterFileError

EVERY = pytest.mark.parametrize("method", METHODS)


def saved(method, folder, family="llama", **options):
    model = wrapped(method, family, **options)
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def not_loaded(model, folder, message):
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=message):
        pyadapt.load(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_file_without_a_prompt(method, family, tmp_path):
    path = saved(method, tmp_path, family)
    tensors = load_file(path)
    key = next(key for key in tensors if "prompt" in key)
    save_file({name: value for name, value in tensors.items() if name != key}, path)
    not_loaded(build(family), tmp_path, r"does not fit this \w+:\s+missing: ")


@pytest.mark.parametrize(("method", "family"), CASES)
@pytest.mark.parametrize("shape", [(TOKENS + 1, 24), (TOKENS, 23), (TOKENS,), (1, TOKENS, 22), ()])
def test_a_prompt_of_another_shape(method, family, shape, tmp_path):
    path = saved(method, tmp_path, family)
    tensors = load_file(path)
    key = next(key for key in tensors if "prompt" in key)
    save_file({**tensors, key: torch.zeros(shape)}, path)
    not_loaded(build(family), tmp_path, r"does not fit this \w+:\s+misshapen: .*the model needs")


@EVERY
def test_tensors_that_belong_to_nothing(method, tmp_path):
    path = saved(method, tmp_path)
    save_file({**load_file(path), "base_model.model.other": torch.zeros(2), "stray": torch.zeros(1)}, path)
    not_loaded(build("llama"), tmp_path, r"extra: .*other[\s\S]*extra: .*stray")


@EVERY
def test_a_damaged_file(method, tmp_path):
    path = saved(method, tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    not_loaded(build("llama"), tmp_path, "adapter_model.safetensors")
    path.unlink()
    not_loaded(build("llama"), tmp_path, "adapter_model")


@EVERY
def test_a_file_that_is_loosely_read_keeps_its_start(method, tmp_path):
    """Without `strict`, what a file lacks starts as usual."""
    path = saved(method, tmp_path)
    save_file({"stray": torch.zeros(1)}, path)
    model = pyadapt.load(build("llama"), tmp_path, strict=False)
    assert "default" in model.peft_config


@EVERY
def test_an_adapter_of_another_model(method, tmp_path):
    saved(method, tmp_path, "gpt2")
    wide = type(build("llama").config)(**{**build("llama").config.to_dict(), "hidden_size": 32, "head_dim": 8})
    model = type(build("llama"))(wide)
    not_loaded(model, tmp_path, "does not fit this LlamaForCausalLM")


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_task(method, tmp_path):
    saved(method, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    not_loaded(build("llama"), tmp_path, "task_type=SEQ_CLS: this LlamaForCausalLM has no head")
