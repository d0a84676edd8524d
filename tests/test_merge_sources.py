"""What an adapter over int8 weights is merged into: the dequantised weights or the original ones, said out loud."""

from __future__ import annotations

import logging

import pytest
import torch
from models import FAMILIES, assert_near, build, snapshot

import pyadapt
from pyadapt import LoraConfig


def wrapped(name, quantised=False):
    model = build(name)
    if quantised:
        pyadapt.quantize(model)
    return pyadapt.wrap(model, LoraConfig(task_type=FAMILIES[name].task, init_lora_weights=False, r=4))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "olmo", "vit"])
def test_from_the_original_weights(name, tmp_path, caplog):
    build(name).save_pretrained(tmp_path)
    model, dense = wrapped(name, quantised=True), wrapped(name)
    for (key, ours), (_, theirs) in zip(
        model.get_adapter_state_dict().items(), dense.get_adapter_state_dict().items(), strict=True
    ):
        with torch.no_grad():
            assert ours.shape == theirs.shape, key
            theirs.copy_(ours)
    exact = pyadapt.merge(dense).state_dict()
    with caplog.at_level(logging.INFO, logger="pyadapt"):
        merged = pyadapt.merge(model, original=tmp_path)
    assert "merged from original weights" in caplog.text
    assert set(merged.merge_report.sources.values()) == {"original weights"}
    for key, value in merged.state_dict().items():
        assert_near(value, exact[key], "merged")


def test_from_dequantised_weights_is_said(caplog):
    model = wrapped("llama", quantised=True)
    with caplog.at_level(logging.INFO, logger="pyadapt"):
        merged = pyadapt.merge(model)
    assert "merged from dequantised int8 weights" in caplog.text
    report = merged.merge_report
    assert len(report.sources) == FAMILIES["llama"].all_linear_count
    assert "relative error at most" in str(report)
    # The estimate is near the true error, which the original weights tell.
    plain = build("llama")
    path = "model.layers.0.mlp.up_proj"
    true, stored = (model.get_submodule(path).weight.detach() for model in (plain, merged))
    error = float((true - stored).norm() / true.norm())
    assert report.errors[path] == pytest.approx(error, rel=0.15)


def test_dense_weights_are_said():
    report = pyadapt.merge(wrapped("llama")).merge_report
    assert str(report).startswith("4 layers merged from dense weights")


def test_original_weights_that_are_not_those_of_the_model(tmp_path):
    model = wrapped("llama", quantised=True)
    before = snapshot(model)
    build("bert").save_pretrained(tmp_path / "bert")
    for path, match in ((tmp_path / "bert", "has no weight model.layers.0"), (tmp_path / "none", "no safetensors")):
        with pytest.raises(pyadapt.AdapterFileError, match=match):
            pyadapt.merge(model, original=path)
        assert snapshot(model) == before
