"""Multitask prompt tuning: a target task that starts from what was learnt on source tasks."""

from __future__ import annotations

import os

import pytest
import torch
from models import snapshot
from prompt_cases import CONFIGS, TOKENS, WIDTH, batch, build, config_of, peft_twin, wrapped
from safetensors.torch import load_file, save_file

import pyadapt

STARTS = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


def unit_of(model, name="default"):
    """The unit that holds the parameters."""
    return next(module.adapters[name] for module in model.modules() if hasattr(module, "adapters"))


def source(folder, family="llama", task="CAUSAL_LM", by="pyadapt", **options):
    """A folder with an adapter of source tasks, saved by us or by peft, and its tensors."""
    model = wrapped(family, task, "multitask", **options)
    saved = model if by == "pyadapt" else peft_twin(build(family, task), model)
    saved.save_pretrained(folder)
    return load_file(os.path.join(folder, "adapter_model.safetensors"))


def target(path, start, **options):
    given = {"num_tasks": 1, "prompt_tuning_init": start, "prompt_tuning_init_state_dict_path": str(path), **options}
    return config_of("multitask", options.pop("task_type", "CAUSAL_LM"), **given)


@pytest.mark.parametrize("by", ["pyadapt", "peft"])
@pytest.mark.parametrize("form", ["file", "folder", "bin"])
@pytest.mark.parametrize("start", STARTS)
def test_a_target_starts_where_pefts_does(start, form, by, tmp_path):
    import peft

    tensors = source(tmp_path, by=by)
    file = tmp_path / "adapter_model.safetensors"
    path = {"file": file, "folder": tmp_path, "bin": tmp_path / "source.bin"}[form]
    torch.save(tensors, tmp_path / "source.bin")
    options = {"prompt_tuning_init_task": 2} if start == "EXACT_SOURCE_TASK" else {}
    unit = unit_of(pyadapt.wrap(build("llama", "CAUSAL_LM"), target(path, start, **options)))
    # PEFT reads no folder.
    theirs = {
        **CONFIGS["multitask"], "task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS, "num_tasks": 1, **options,
        "prompt_tuning_init": start, "prompt_tuning_init_state_dict_path": str(file if form == "folder" else path),
    }  # fmt: skip
    twin = peft.get_peft_model(build("llama", "CAUSAL_LM"), peft.get_peft_config(theirs)).prompt_encoder["default"]
    assert torch.equal(unit.embeddings, twin.embedding.weight)
    assert torch.equal(unit.embeddings, tensors["prompt_embeddings"])
    if start != "ONLY_SOURCE_SHARED":
        assert torch.equal(unit.columns, twin.prefix_task_cols)
        assert torch.equal(unit.rows, twin.prefix_task_rows)
        assert unit.rows.abs().max() > 0.2
    else:
        assert unit.rows.abs().max() < 0.2


def test_of_two_parts_of_a_model(tmp_path):
    tensors = source(tmp_path, "t5", "SEQ_2_SEQ_LM", num_transformer_submodules=2)
    config = target(tmp_path, "AVERAGE_SOURCE_TASKS", task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2)
    model = pyadapt.wrap(build("t5", "SEQ_2_SEQ_LM"), config)
    assert torch.equal(unit_of(model).embeddings, tensors["prompt_embeddings"])
    assert unit_of(model).embeddings.shape == (2 * TOKENS, WIDTH)


def test_the_shared_prompt_alone_may_serve_several_tasks(tmp_path):
    tensors = source(tmp_path)
    model = pyadapt.wrap(build("llama", "CAUSAL_LM"), target(tmp_path, "ONLY_SOURCE_SHARED", num_tasks=4, num_ranks=1))
    unit = unit_of(model)
    assert torch.equal(unit.embeddings, tensors["prompt_embeddings"])
    assert unit.columns.shape == (4, TOKENS, 1)


def test_trained_from_a_source_and_loaded_without_it(tmp_path):
    source(tmp_path / "source")
    model = pyadapt.wrap(build("llama", "CAUSAL_LM"), target(tmp_path / "source", "EXACT_SOURCE_TASK"))
    given, ids = batch("CAUSAL_LM"), torch.tensor([0, 0])
    model.train()(**given, task_ids=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in unit_of(model).parameters())
    model.save_pretrained(tmp_path / "target")
    for file in (tmp_path / "source").iterdir():
        file.unlink()
    loaded = pyadapt.load(build("llama", "CAUSAL_LM"), tmp_path / "target", is_trainable=True)
    with torch.no_grad():
        assert torch.equal(loaded(**given, task_ids=ids).logits, model(**given, task_ids=ids).logits)


@pytest.mark.parametrize(
    ("start", "changed", "options", "message"),
    [
        ("EXACT_SOURCE_TASK", {"prefix_task_cols": None}, {}, "prefix_task_cols is missing, wanted"),
        ("AVERAGE_SOURCE_TASKS", {"prefix_task_rows": None}, {}, "prefix_task_rows is missing, wanted"),
        ("ONLY_SOURCE_SHARED", {"prompt_embeddings": None}, {}, "prompt_embeddings is missing, wanted"),
        (
            "ONLY_SOURCE_SHARED",
            {"prompt_embeddings": (4, WIDTH)},
            {},
            r"prompt_embeddings is \(4, 16\), wanted \(3, 16\)",
        ),
        ("AVERAGE_SOURCE_TASKS", {"prefix_task_cols": (3, TOKENS, 5)}, {}, r"prefix_task_cols is \(3, 3, 5\), wanted"),
        ("AVERAGE_SOURCE_TASKS", {"prefix_task_rows": (WIDTH,)}, {}, r"prefix_task_rows is \(16,\), wanted"),
        ("AVERAGE_SOURCE_TASKS", {"prefix_task_rows": (2, 2, WIDTH)}, {}, "cols has 3 tasks, .*rows has 2"),
        (
            "EXACT_SOURCE_TASK",
            {},
            {"prompt_tuning_init_task": 3},
            "init_task=3: the source has tasks 0 to 2",
        ),
        ("EXACT_SOURCE_TASK", {}, {"prompt_tuning_init_task": -1}, "prompt_tuning_init_task=-1"),
        ("EXACT_SOURCE_TASK", {}, {"num_tasks": 2}, "num_tasks=2: EXACT_SOURCE_TASK makes one target task"),
        ("AVERAGE_SOURCE_TASKS", {}, {"num_tasks": 3}, "num_tasks=3: AVERAGE_SOURCE_TASKS makes one target task"),
        ("AVERAGE_SOURCE_TASKS", {}, {"num_virtual_tokens": 4}, r"prompt_embeddings is \(3, 16\), wanted \(4, 16\)"),
    ],
)
def test_a_source_that_does_not_fit(start, changed, options, message, tmp_path):
    tensors = source(tmp_path)
    for key, shape in changed.items():
        if shape is None:
            del tensors[key]
        else:
            tensors[key] = torch.zeros(shape)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refused(target(tmp_path, start, **options), message)


def test_a_source_that_is_not_there(tmp_path):
    for path in (tmp_path / "nowhere.safetensors", tmp_path / "nowhere", tmp_path):
        refused(target(path, "ONLY_SOURCE_SHARED"), "prompt_tuning_init_state_dict_path=")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    refused(target(tmp_path / "broken.safetensors", "ONLY_SOURCE_SHARED"), "prompt_tuning_init_state_dict_path=")


def refused(config, message):
    model = build("llama", "CAUSAL_LM")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pyadapt.wrap(model, config)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "needs prompt_tuning_init_state_dict_path"),
        (
            {"prompt_tuning_init": "SAMPLE_VOCAB"},
            "'SAMPLE_VOCAB' is not one of TEXT, RANDOM, AVERAGE",
        ),
        ({"num_tasks": 0}, "num_tasks=0: a whole number of at least 1 is needed"),
        ({"num_ranks": 1.5}, "num_ranks=1.5: a whole number of at least 1 is needed"),
    ],
)
def test_a_configuration_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        config_of("multitask", "CAUSAL_LM", **options)
