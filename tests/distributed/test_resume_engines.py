"""Plain loops under each engine: saved on two ranks, resumed on two, one and four."""

from __future__ import annotations

import os

import gang
import pytest
import torch
from resume_cases import SAVED_AT, names_in, run, run_and_resume, wrapped
from tolerance import assert_close, assert_near

from pyadapt.trained import MARK

# What FSDP1 and DDP keep of the base: see docs/resuming.md.
ENGINES = ("zero3", "zero3_fp16", "zero0", "zero1", "zero2", "fsdp2", "fsdp1", "ddp")
# On how many other ranks: DeepSpeed's own checkpoints (ZeRO-0 to 2) are for as many; half precision hides differences;
# torch's optim_state_dict of FSDP1 fails where a rank has no part of a parameter, as of this tiny model on four.
OTHER_RANKS = {"zero0": (), "zero1": (), "zero2": (), "zero3_fp16": (), "fsdp1": (1,)}


def assert_goes_on(found, whole, where, exact):
    """Losses and final adapter of a run that was resumed are those of one that was not."""
    (losses, adapter), (all_losses, wanted) = found, whole
    if exact:
        assert losses == all_losses[SAVED_AT:], where
    assert_near(torch.tensor(losses), torch.tensor(all_losses[SAVED_AT:]), "loss")
    assert adapter.keys() == wanted.keys()
    for key, value in wanted.items():
        if exact:
            assert (adapter[key] == value).all(), f"{where}: {key}"
        assert_close(torch.tensor(adapter[key]), torch.tensor(value), "gradient", torch.float32, f"{where}: {key}")


def assert_no_base(folder):
    """A checkpoint that accelerate has written under FSDP has what is trained, and no frozen parameter."""
    whole = os.path.join(folder, "pytorch_model_fsdp.bin")
    if os.path.exists(whole):
        names = set(torch.load(whole, weights_only=True))
    else:
        names = names_in("fsdp", os.path.join(folder, "pytorch_model_fsdp_0"))
    assert names > {MARK}
    assert all(".default." in name or "of_default" in name for name in names - {MARK}), sorted(names)


@pytest.mark.parametrize("engine", ENGINES)
def test_goes_on_with_any_number_of_ranks(engine, tmp_path):
    folder = str(tmp_path)
    both = gang.run(2, run_and_resume, engine, folder)
    for rank, (whole, again) in enumerate(both):
        assert_goes_on(again, whole, f"rank {rank} of 2", exact=True)
    whole = both[0][0]
    if engine not in ("fsdp1", "ddp"):
        model = wrapped()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names_in(engine, folder) - {MARK} == trained, "the base is not in it"
    for ranks in OTHER_RANKS.get(engine, (1, 4)):
        again = gang.run(ranks, run, engine, folder, SAVED_AT)
        assert_goes_on(again[0], whole, f"on {ranks}", exact=False)
