"""AdaLoRA under each engine: penalty, schedule and ranks of a single process, step by step."""

import adalora_sharded_cases as cases
import gang
import pytest
import torch
from tolerance import assert_close, assert_near

MOST = ["clipped", "reentrant", "non-reentrant"]


def told(wrong):
    return "\n".join(f"{name}: {why}" for rank in wrong for name, why in rank.items())


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        ("ddp", ["clipped", "non-reentrant"]),
        ("zero3", MOST),
        ("fsdp1", ["clipped", "non-reentrant"]),
        ("fsdp1_flat", ["clipped", "reentrant"]),
        ("fsdp2", [*MOST, "no penalty"]),
    ],
)
def test_every_step_is_that_of_one_process(engine, names):
    assert not any(wrong := gang.run(2, cases.compare_all, engine, names)), told(wrong)


def test_two_calls_before_a_backward():
    gang.run(2, cases.compare, "fsdp2", "plain", True)


def test_gradients_under_zero3_with_its_optimizer_on_the_cpu():
    gang.run(2, cases.compare, "zero3", "offloaded")


def test_without_gradients_ranks_are_not_allocated():
    assert gang.run(2, cases.errors_too_late, "fsdp1_flat") == [cases.TOO_LATE] * 2


def test_clipping_is_seen():
    """What the comparisons above would miss if it were not."""
    model, free = cases.wrapped("clipped"), cases.wrapped("clipped")
    _, _, clipped = cases.train(model, None, "clipped")
    cases.CASES["free"] = ("llama", {}, {"accumulate": 2})
    _, _, whole = cases.train(free, None, "free")
    assert all(value.max() < 0.9 * whole[key].max() for key, value in clipped.items())


@pytest.mark.parametrize("resume", [False, True])
# Under FSDP2 torch reads no FULL_STATE_DICT of an optimizer that has no state, as SGD.
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp1", "fsdp2_sharded"])
def test_trainers_callback(engine, resume, tmp_path):
    """From the first step on; and from a checkpoint that this engine has left in the midst of the schedule."""
    losses, kept, adapter = gang.run(1, cases.by_trainer, "alone", str(tmp_path / "alone"), group=False)[0]
    assert any(not all(unit) for unit in kept), "ranks have been taken away"
    folder = tmp_path / engine
    folder.mkdir()
    ranks = gang.run(2, cases.by_trainer, engine, str(folder), group=False)
    if resume:
        ranks = gang.run(2, cases.by_trainer, engine, str(folder), True, group=False)
    for found, found_kept, found_adapter in ranks:
        assert_near(torch.tensor(found), torch.tensor(losses), "loss")
        assert found_kept == kept
        for key, value in adapter.items():
            assert_close(torch.tensor(found_adapter[key]), torch.tensor(value), "gradient", torch.float32, key)
