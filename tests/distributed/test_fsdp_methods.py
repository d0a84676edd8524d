"""Every method under DDP, FSDP1 (both values of use_orig_params) and FSDP2 trains as one process does."""

import gang
import methods_cases
import pytest
from methods_cases import CASES

# What has no unit of its own because a layer or two modules read it, which FSDP1 without use_orig_params refuses
# (tests/distributed/test_fsdp_policy.py).
NEEDS_ORIG_PARAMS = {"lora-bias", "multitask"}
# Trained parameters of two dtypes in one group, which FSDP2 cannot have; in groups of their own they train.
TWO_DTYPES = {"lora-bias", "p-tuning"}


def check(engine, names, base, **options):
    wrong = gang.run(2, methods_cases.compare_all, engine, names, base, options)
    assert wrong == [{}, {}], "\n".join(f"{name}: {text}" for name, text in wrong[0].items())


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_fp32_bases(engine):
    check(engine, [name for name in CASES if engine != "fsdp1_flat" or name not in NEEDS_ORIG_PARAMS], "fp32")


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_int8_bases(engine):
    names = [name for name in CASES if engine != "fsdp1_flat" or name not in NEEDS_ORIG_PARAMS]
    check(engine, names, "int8")


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_bf16_bases(engine):
    # FSDP1 has one dtype in a unit; what several modules read (multitask) lies in that of the model.
    left_out = {"fsdp1": {"multitask"}, "fsdp1_flat": NEEDS_ORIG_PARAMS, "fsdp2": TWO_DTYPES}.get(engine, set())
    check(engine, [name for name in CASES if name not in left_out], "bf16")


def test_units_as_groups_of_fsdp2():
    check("fsdp2_units", sorted({"lora", "lora-saved", "prefix", *TWO_DTYPES}), "bf16")
