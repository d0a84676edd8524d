"""kill -9: of the only process, of one of two, and of one that is saving; training goes on as if nothing had been."""

from __future__ import annotations

import os

import gang
import pytest
import resume_cases
from safetensors.torch import load_file
from test_resume_engines import assert_goes_on
from trainer_cases import loop, run

import pyadapt
from pyadapt.trained import MARK


def killed(ranks, function, *args, **options):
    """Run what ends by SIGKILL; what the ranks said."""
    with pytest.raises(gang.GangError) as error:
        gang.run(ranks, function, *args, **options)
    assert "died with exit code -9" in str(error.value)
    return str(error.value)


def alone(function, *args):
    return gang.run(1, function, "alone", *args, group=False)[0]


def test_trainer_is_bitwise(tmp_path):
    """With dropout: its seeds come from the generators whose states are saved."""
    whole = alone(run, str(tmp_path / "whole"), False, 0.2)
    folder = str(tmp_path / "killed")
    killed(1, run, "alone", folder, False, 0.2, "between steps", group=False)
    found = pyadapt.last_checkpoint(folder)
    assert found.endswith("checkpoint-2")
    assert_goes_on(alone(run, folder, found, 0.2), whole, "Trainer", exact=True)


def test_half_a_checkpoint_is_passed_over(tmp_path, caplog):
    folder = str(tmp_path)
    killed(1, run, "alone", folder, False, 0.0, "saving", group=False)
    assert os.path.isdir(tmp_path / "checkpoint-4")
    assert pyadapt.last_checkpoint(folder) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 is passed over: it has no trainer_state.json" in caplog.text
    weights = tmp_path / "checkpoint-2" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert pyadapt.last_checkpoint(folder) is None


def test_accelerate_is_bitwise(tmp_path):
    whole = alone(loop, str(tmp_path / "whole"), 0, 0.2)
    folder = str(tmp_path / "killed")
    killed(1, loop, "alone", folder, 0, 0.2, "between steps", group=False)
    kept = load_file(os.path.join(folder, "model.safetensors"))
    assert MARK in kept
    assert "bert.pooler.dense.weight" not in kept
    assert_goes_on(alone(loop, folder, 2, 0.2), whole, "accelerate", exact=True)


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp1", "fsdp2"])
def test_one_of_two_ranks(engine, tmp_path):
    folder = str(tmp_path)
    whole = gang.run(2, resume_cases.run, engine, str(tmp_path / "whole"))[0]
    said = killed(2, resume_cases.run, engine, folder, 0, True)
    assert "rank 0: Traceback" in said, said
    assert "did not end in time" not in said, said
    again = gang.run(2, resume_cases.run, engine, folder, resume_cases.SAVED_AT)[0]
    assert_goes_on(again, whole, engine, exact=True)
