"""Prompt adapters over quantised bases, and under transformers' Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from models import assert_near, build, model_batch
from prompt_life_cases import METHODS, batch_of, output, step, trained, wrapped

import pyadapt
from pyadapt.base import base_of
from pyadapt.trained import is_trained_state

EVERY = pytest.mark.parametrize("method", METHODS)


@EVERY
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_int8_base(method, family):
    """The adapter over quantised weights is the adapter over their dequantised twin."""
    base = pyadapt.quantize(build(family))
    dense = copy.deepcopy(base)
    for layer in dense.modules():
        kind = base_of(layer)
        if kind is not None and kind.quantized:
            kind.make_dense(layer, kind.matrix(layer))
    model, twin = wrapped(method, family, base=base), wrapped(method, family, base=dense)
    batch = batch_of(method, family)
    assert_near(output(model, batch), output(twin, batch), "model")
    _, found = step(model.train(), batch)
    _, expected = step(twin.train(), batch)
    for key, gradient in expected.items():
        assert_near(found[key], gradient, "gradient")
    assert type(pyadapt.unwrap(model)) is type(base)


@EVERY
@pytest.mark.parametrize("bits", [8, 4])
def test_a_bitsandbytes_base(method, bits, tmp_path, monkeypatch):
    from transformers import BitsAndBytesConfig

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    plain = build("llama")
    plain.save_pretrained(tmp_path)
    options = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = wrapped(method, base=type(plain).from_pretrained(tmp_path, quantization_config=options).eval())
    batch = batch_of(method)
    with model.disable_adapter():
        untouched = output(model, batch)
    assert not torch.equal(output(model, batch), untouched)
    _, found = step(model.train(), batch)
    assert sorted(found) == sorted(trained(model))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@EVERY
def test_trainer(method, tmp_path):
    """transformers' Trainer trains it, and saves the adapter's files alone."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[0] for key, value in model_batch("llama", seed=i, rows=1).items()} for i in range(8)]
    if method == "multitask":
        rows = [{**row, "task_ids": torch.tensor(i % 2)} for i, row in enumerate(rows)]
    model = wrapped(method)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, learning_rate=3e-2, logging_steps=1, use_cpu=True,
        report_to=[], disable_tqdm=True, seed=11, dataloader_pin_memory=False, num_train_epochs=6,
        save_strategy="epoch", save_total_limit=1, remove_unused_columns=False,
    )  # fmt: skip
    run = Trainer(model=model, args=arguments, train_dataset=rows)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < sum(losses[:2])
    folder = max(tmp_path.glob("checkpoint-*"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert is_trained_state(str(folder / "model.safetensors"))
    loaded = pyadapt.load(build("llama"), folder)
    batch = batch_of(method)
    assert torch.equal(output(loaded, batch), output(model.eval(), batch))
