"""Training options under DDP, FSDP1 and FSDP2, more processes, and a fault that the comparison sees."""

import fsdp_cases
import gang
import pytest
import torch
from tolerance import tolerance

ENGINES = ["ddp", "fsdp1", "fsdp1_flat", "fsdp2"]
ROWS = [
    ("lora", {"accumulate": 2, "clip": 0.1}),
    ("lora-t5", {"accumulate": 2, "steps": 2}),
    ("lora", {"checkpointing": "reentrant", "steps": 2}),
    ("dora", {"checkpointing": "non-reentrant", "clip": 0.1, "steps": 2}),
    ("prefix-mlp", {"checkpointing": "non-reentrant", "steps": 2}),
    ("lora", {"autocast": True, "steps": 2}),
]


@pytest.mark.parametrize("engine", [*ENGINES, "fsdp2_units"])
def test_training_options_faults_and_switching(engine):
    rows = ROWS if engine == "ddp" else [*ROWS, ("lora", {"mixed": True, "steps": 2})]
    wrong = gang.run(2, fsdp_cases.compare_all_options, engine, rows)
    assert wrong == [{}, {}], "\n".join(f"{name}: {text}" for name, text in wrong[0].items())


@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes(engine):
    rows = [("lora", {"steps": 2}), ("lora-saved", {"steps": 2})]
    wrong = gang.run(4, fsdp_cases.compare_options, engine, rows)
    assert wrong == [{}] * 4, "\n".join(f"{name}: {text}" for name, text in wrong[0].items())


def test_compiled():
    rows = [("lora", {"backend": "aot_eager", "steps": 2})]
    assert gang.run(2, fsdp_cases.compare_options, "ddp", rows) == [{}, {}]


def test_t5_prepared_by_accelerate_for_fsdp2():
    for loss, wanted in gang.run(2, fsdp_cases.t5_under_accelerate):
        assert loss == pytest.approx(wanted, rel=tolerance("loss", torch.float32).eps)
