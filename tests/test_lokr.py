"""LoKr on linear layers: how it is cut, its other start, and its routes. The rest: `test_lycoris.py`."""

from __future__ import annotations

import pytest
import torch
from lycoris_cases import (
    FULL,
    LOKR_FORMS,
    SPLIT,
    among,
    assert_gradients_are_those_of_peft,
    kept_beside,
    logits,
    pair,
    small,
    train,
    wrap,
)
from models import assert_near, build
from peft.tuners.lokr.layer import factorization as factorization_of_peft
from torch import nn

import pyadapt
from pyadapt import AdapterConfig, LoKrConfig, native
from pyadapt.methods.lycoris.lokr import factorization
from pyadapt.ops import routes


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"decompose_factor": 0}, "decompose_factor=0: a whole number of at least 1 is needed, or -1"),
        ({"decompose_factor": -2}, "decompose_factor=-2"),
        ({"decompose_factor": 1.5}, "decompose_factor=1.5"),
        ({"init_weights": "kaiming"}, "init_weights='kaiming': LoKr knows True, False and \"lycoris\""),
        ({"decompose_factors": 3}, "did you mean 'decompose_factor'"),
    ],
)
def test_bad_values(values, match):
    with pytest.raises(ValueError, match=match):
        AdapterConfig.from_dict({"peft_type": "LOKR", **values})


def test_dimensions_are_cut_as_in_peft():
    """Also where the factor does not divide, and where it is larger than the rest."""
    for size in [*range(1, 150), 360, 1023, 2048, 5504]:
        for factor in [-1, *range(1, 40), 97, size]:
            assert factorization(size, factor) == factorization_of_peft(size, factor), (size, factor)


@among(LOKR_FORMS)
def test_every_form_trains_as_in_peft_on_the_reference_route(case):
    with routes.forced("reference"):
        assert_gradients_are_those_of_peft(*pair(case))


def test_the_start_of_lycoris_learns():
    model = wrap(SPLIT, init_weights="lycoris", target_modules="all-linear").train()
    losses = train(model, seeds=[0] * 20, rate=3e-2)
    assert losses[-1] < 0.9 * losses[0]


@among([SPLIT, FULL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_saved_beside_x_and_the_factors(case, dtype):
    model = small(case, (40, 48), dtype).train()
    assert kept_beside(model, torch.randn(96, 48).to(dtype).requires_grad_()) == 0


@pytest.mark.parametrize(
    ("dtype", "config", "ending"),
    [
        (torch.float32, {}, ", kronecker"),
        (torch.float64, {}, "reference, kronecker in torch"),
        (torch.float32, {"decompose_factor": 2, "r": 512}, ", kronecker in torch"),
    ],
    ids=str,
)
def test_the_route(dtype, config, ending):
    model = nn.Sequential(nn.Linear(2048, 2048, dtype=dtype))
    (row,) = pyadapt.plan(model, LoKrConfig(target_modules=["0"], **config)).layers
    assert row.kernel.endswith(ending if native.available() else " in torch")


@pytest.mark.parametrize("changes", [{"decompose_factor": 2}, {"r": 1, "decompose_both": True}], ids=str)
def test_hotswap_to_another_cut(changes, tmp_path):
    other = wrap(SPLIT, **changes)
    other.save_pretrained(tmp_path)
    model = wrap(SPLIT).eval()
    assert not model.hotswap_adapter(tmp_path)
    assert_near(logits(model), logits(other), "model")


@pytest.mark.parametrize("r", [1, 3])
def test_hotswap_of_a_split_w1(r, tmp_path):
    form = {"decompose_both": True, "decompose_factor": 8, "rank_pattern": {"v_proj": 3}}
    wrap(SPLIT, r=r, alpha=2, **form).save_pretrained(tmp_path)
    model = wrap(SPLIT, r=3, **form).eval()
    # At rank 1 w2 of q_proj is split, and at rank 3 full.
    assert model.hotswap_adapter(tmp_path) is (r == 3)
    assert_near(logits(model), logits(pyadapt.load(build("llama"), tmp_path)), "model")
