"""Ranks that do not do the same end with an error that says so, on each of them, and do not wait for ever."""

from __future__ import annotations

import importlib.metadata
import os

import gang
import pytest
import ranks_cases
from models import build

import pyadapt
from pyadapt.distributed import launched, readiness

LORA = {"peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM"}


def test_ranks_that_wrap_or_train_differently(tmp_path):
    first, second = gang.run(2, ranks_cases.several, str(tmp_path))
    for found in (first, second):
        assert "RankError" in found["another rank of LoRA"]
        assert "rank 1 and rank 0 differ in r of the configuration: 5 and 4" in found["another rank of LoRA"]
        assert "target_modules of the configuration" in found["other targets"]
        assert "differ in" in found["another model"]
        assert "nothing" in found["a rank that fails"]
        assert found["the same"] == "none"
        assert "the layers and their shapes" in found["trained otherwise"]
        assert found["trained alike"] == "none"
    assert "RankError: planning the adapter failed on rank 1: ValueError" in first["a rank that fails"]
    assert second["a rank that fails"].startswith("ValueError")
    assert "rank 1 did not come here" in first["a rank that is missing"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "zero3"])
def test_wrapping_too_late(engine):
    for found in gang.run(2, ranks_cases.wrapping_too_late, engine):
        assert "RuntimeError: this model is sharded already: wrap it first, then shard it" in found["outside"]
        if engine != "ddp":
            assert "wrap it first" in found["inside"]
            assert "wrap it first" in found["another adapter"]


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "zero3"])
def test_saving_on_one_rank(engine, tmp_path):
    first, _ = gang.run(2, ranks_cases.saving_on_one_rank, engine, str(tmp_path))
    assert "rank 1 did not come here" in first["alone"]
    assert "the state dict to save from, on rank 0, is empty" in first["partial"]
    assert first["written"] == "False"


def test_failing_together():
    first, second = gang.run(2, ranks_cases.failing_together)
    assert first["one"] == "RankError: writing failed on rank 1: OSError: the disk is full"
    assert second["one"] == "OSError: the disk is full"
    assert first["none"] == second["none"] == "none"


def test_accelerate_that_takes_each_process_for_the_only_one(monkeypatch):
    from accelerate.state import PartialState

    model = pyadapt.wrap(build("llama"), LORA)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 1)
    with pytest.raises(RuntimeError, match=r"2 processes were started.*InitProcessGroupKwargs\(backend=\"gloo\"\)"):
        model.train()
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    model.train()


def test_an_engine_that_is_too_old(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.9.5")
    with pytest.raises(RuntimeError, match=r"deepspeed 0\.9\.5 is too old .* 0\.16 or newer"):
        readiness.check_versions("zero3")


@pytest.mark.parametrize(
    ("said", "engine"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp1"),
        ({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}, None),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, None),
    ],
)
def test_the_engine_to_come(said, engine, monkeypatch):
    from accelerate.state import AcceleratorState

    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    assert launched.engine_to_come() == engine
