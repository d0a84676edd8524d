"""accelerate's loop under each engine: `save_state` on two ranks, `load_state` on two and on other numbers."""

from __future__ import annotations

import gang
import pytest
from resume_cases import SAVED_AT
from test_resume_engines import assert_goes_on, assert_no_base
from trainer_cases import loop

from pyadapt.trained import MARK

ENGINES = ["ddp", "zero3", "fsdp1", "fsdp1_flat", "fsdp1_sharded", "fsdp2", "fsdp2_sharded"]


@pytest.mark.parametrize("engine", ENGINES)
def test_accelerate_goes_on(engine, tmp_path):
    folder = str(tmp_path)
    whole = gang.run(2, loop, engine, folder, group=False)[0]
    if engine.startswith("fsdp"):
        assert_no_base(folder)
    # torch shows no state of an optimizer that has a part of no parameter, as on one of four ranks: see resuming.md.
    for ranks in (2, 1) if engine == "fsdp1_sharded" else (2, 1, 4):
        again = gang.run(ranks, loop, engine, folder, SAVED_AT, group=False)[0]
        assert_goes_on(again, whole, f"on {ranks}", exact=ranks == 2)


def test_saved_by_one_process_and_resumed_on_two(tmp_path):
    from safetensors import safe_open

    whole = gang.run(1, loop, "alone", str(tmp_path), group=False)[0]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert MARK in set(file.keys())
    again = gang.run(2, loop, "ddp", str(tmp_path), SAVED_AT, group=False)[0]
    assert_goes_on(again, whole, "on 2", exact=False)
