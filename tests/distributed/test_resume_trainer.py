"""transformers' Trainer under each engine: saved on two ranks, resumed on two and on another number."""

from __future__ import annotations

import os
import re

import gang
import pytest
from safetensors.numpy import load_file
from test_resume_engines import assert_goes_on, assert_no_base
from trainer_cases import best, refusal, run


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp1", "fsdp1_sharded", "fsdp2", "fsdp2_sharded"])
def test_trainer_goes_on(engine, tmp_path):
    folder = str(tmp_path)
    whole = gang.run(2, run, engine, folder, group=False)[0]
    if engine.startswith("fsdp"):
        assert_no_base(str(tmp_path / "checkpoint-2"))
    for ranks in (2, 1):
        again = gang.run(ranks, run, engine, folder, True, group=False)[0]
        assert_goes_on(again, whole, f"on {ranks}", exact=ranks == 2)
    files = os.listdir(tmp_path / "checkpoint-2")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files), files


OURS = "AdapterFileError: the checkpoint belongs to another model or other adapters than this"
# Who finds it first, where torch or DeepSpeed compares names and shapes before the model sees anything.
FOUND_BY = {
    "ddp": {"rank": OURS, "fewer": OURS, "more": OURS},
    "zero3": {"rank": OURS, "fewer": OURS, "more": OURS},
    "fsdp1": {"rank": OURS, "fewer": OURS, "more": OURS},
    "fsdp1_sharded": {"rank": "Size mismatch", "fewer": OURS, "more": "Missing key in checkpoint state_dict"},
    "fsdp2": {"rank": "doesn't match the broadcast shape", "fewer": "KeyError", "more": "self.key|" + OURS},
    "fsdp2_sharded": {"rank": "Size mismatch", "fewer": OURS, "more": "Missing key in checkpoint state_dict"},
}
OTHERS = {
    "rank": {"r": 2},
    "fewer": {"target_modules": ["query"]},
    "more": {"target_modules": ["query", "value", "key"]},
}


@pytest.mark.parametrize("engine", FOUND_BY)
def test_the_checkpoint_of_other_adapters_is_refused_on_every_rank(engine, tmp_path):
    gang.run(2, run, engine, str(tmp_path), group=False)
    for name, config in OTHERS.items():
        for said in gang.run(2, refusal, engine, str(tmp_path), config, group=False):
            assert re.search(FOUND_BY[engine][name], said), f"{name}: {said}"


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp1", "fsdp2"])
def test_the_best_checkpoint_is_loaded_at_the_end(engine, tmp_path):
    for name, adapter in gang.run(2, best, engine, str(tmp_path), group=False):
        assert name == "checkpoint-2"
        first, last = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 4))
        for key, value in adapter.items():
            assert (value == first[f"base_model.model.{key}"]).all(), key
        assert any((value != last[f"base_model.model.{key}"]).any() for key, value in adapter.items())
