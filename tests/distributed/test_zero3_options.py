"""The options of DeepSpeed ZeRO-3: the losses and the final adapter of a single process with each."""

from __future__ import annotations

import gang
import pytest
import zero3_cases
from zero3_cases import OPTIONS


def right(function, *args):
    """What went wrong is nothing."""
    for wrong in gang.run(2, function, *args):
        assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())


@pytest.mark.parametrize("names", [list(OPTIONS)[:6], list(OPTIONS)[6:]])
def test_options_train_as_in_one_process(names):
    right(zero3_cases.options, names)


def test_a_compiled_engine_trains_as_one_process():
    right(zero3_cases.compiled)


def test_generation_and_evaluation_between_steps():
    right(zero3_cases.evaluating)


def test_deepspeeds_own_adam_on_the_cpu():
    right(zero3_cases.by_cpu_adam)


@pytest.mark.parametrize("engine", ["zero3", "fsdp1", "fsdp2", "ddp"])
def test_ranks_with_other_seeds_start_from_the_same_adapter(engine):
    right(zero3_cases.seeds_of_their_own, engine)
