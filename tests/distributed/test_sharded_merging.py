"""Merging in place, unmerging and exporting under engines that shard; what a sharded model cannot do says so."""

import gang
import merging_cases as cases
import pytest

# FSDP1 holds a tied weight in one unit alone; the embedding and its head are both in the root's.
EXPORTS = [("lora", "fp32"), ("dora", "bf16"), ("ia3", "fp32"), ("lora", "int8"), ("lora-saved", "fp32")]
IN_PLACE = [("lora", "fp32"), ("dora", "bf16"), ("lora", "int8")]


def told(wrong):
    return "\n".join(f"{name}: {why}" for rank in wrong for name, why in rank.items())


@pytest.mark.parametrize("engine", ["zero3", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_exports_are_those_of_one_process(engine, tmp_path):
    more = [("lora-bias", "fp32"), ("tied", "fp32"), ("untied", "fp32")] if engine in ("zero3", "fsdp2") else []
    wrong = gang.run(2, cases.check_all, cases.check_export, engine, [*EXPORTS, *more], str(tmp_path))
    assert not any(wrong), told(wrong)


@pytest.mark.parametrize("engine", ["zero3", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_merged_in_place_and_exactly_back(engine, tmp_path):
    more = [("tied", "fp32")] if engine in ("zero3", "fsdp2") else []
    wrong = gang.run(2, cases.check_all, cases.check_in_place, engine, [*IN_PLACE, *more], str(tmp_path))
    assert not any(wrong), told(wrong)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_refused_with_the_way_out(engine, tmp_path):
    assert not any(wrong := gang.run(2, cases.check_refusals, engine, str(tmp_path))), told(wrong)
