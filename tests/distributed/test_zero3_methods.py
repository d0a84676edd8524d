"""Each method under DeepSpeed ZeRO-3: the losses and the final adapter of a single process."""

from __future__ import annotations

import gang
import methods_cases
import pytest
import zero3_cases
from methods_cases import CASES

# DeepSpeed takes trained parameters of one dtype alone unless it holds the model in bf16 itself (`bf16.enabled`, which
# test_zero3_options tries). These train copies of bf16 weights beside fp32 adapters.
MIXED = {"lora-saved", "lora-bias", "p-tuning"}


def right(*args, **options):
    """Whether all cases are right, with what is wrong."""
    for wrong in gang.run(2, methods_cases.compare_all, *args, **options):
        assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())


@pytest.mark.parametrize("base", ["fp32", "int8"])
def test_each_method_trains_as_in_one_process(base):
    right("zero3", list(CASES), base)


def test_each_method_trains_over_a_base_in_bf16():
    right("zero3", [name for name in CASES if name not in MIXED], "bf16")


def test_four_processes_train_as_one():
    for wrong in gang.run(4, methods_cases.compare_all, "zero3", ["lora", "lora-t5"], "int8"):
        assert not wrong, wrong


def test_another_training_is_found_out():
    for wrong in gang.run(2, zero3_cases.clipped):
        assert "loss" in wrong["lora-t5"]
