"""LoKr on convolutions: shapes, routes, what is kept, and a fault of peft. The rest: `test_lycoris_conv.py`."""

from __future__ import annotations

import pytest
import torch
from lycoris_cases import LOKR_CONVS, among, delta, kept_beside, twin_of, wrapped
from models import assert_near
from torch import nn

import pyadapt
from pyadapt import LoKrConfig


def test_peft_has_another_product_there():
    """Conv1d with a full w2: peft lines up w1 with the last two dimensions of w2, the kernel for the channels."""
    full = LOKR_CONVS[2]
    model = wrapped(full, 1)
    theirs = twin_of(full, model, 1).base_model.model[0].get_delta_weight("default")
    assert not torch.allclose(theirs.double(), delta(model[0]), atol=1e-3)
    unit = model[0].unit("default")
    assert_near(theirs, unit.scaling * torch.kron(unit.lokr_w1, unit.lokr_w2).reshape(theirs.shape), "layer")


def test_shapes_and_route_are_planned():
    config = LoKrConfig(target_modules=["0", "1", "2", "3"], r=1, use_effective_conv2d=True)
    layers = nn.Conv1d(8, 12, 3), nn.Conv2d(8, 12, (1, 3), groups=2), nn.Conv2d(8, 12, 1), nn.Conv3d(8, 12, 3)
    rows = pyadapt.plan(nn.Sequential(*layers), config).layers
    assert rows[0].shapes == {"lokr_w1": (3, 2), "lokr_w2_a": (1, 4), "lokr_w2_b": (1, 4), "lokr_t2": (1, 1, 3, 1)}
    assert rows[1].shapes == {"lokr_w1": (3, 2), "lokr_w2_a": (1, 4), "lokr_w2_b": (1, 2), "lokr_t2": (1, 1, 1, 3)}
    # One place: nothing to take apart; nor in three dimensions, which PEFT has not.
    assert rows[2].shapes == {"lokr_w1": (3, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)}
    assert rows[3].shapes == {"lokr_w1": (3, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4 * 27)}
    factored, dense = "kronecker, convolutions", "convolution with dW"
    assert [row.kernel for row in rows] == [factored, dense, factored, factored]
    # Nothing to save where w1 is one number.
    (row,) = pyadapt.plan(nn.Sequential(nn.Conv2d(3, 5, 3)), LoKrConfig(target_modules=["0"])).layers
    assert row.kernel == dense


@among(LOKR_CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_neither_a_cast_input_nor_dW_is_kept(case, dtype, groups):
    """In fp32 U and V are, h values for each of the c and of the a parts of a place; else nothing but x."""
    model = wrapped(case, dtype=dtype, groups=groups).train()
    beside = kept_beside(model, torch.randn(4, 8, 16, 16).to(dtype).requires_grad_(), model[0].weight)
    unit = model[0].unit("default")
    w1, down, up = unit.factors()
    hidden = down.shape[0] * (w1.shape[1] + (w1.shape[0] if up is not None else 0)) * 4 * 14 * 14 * 4
    # What is made of the factors, and copies in which they are multiplied: nothing that grows with x.
    made = 2 * 4 * sum(factor.numel() for factor in (w1, down, up, *unit.parameters()) if factor is not None)
    assert beside <= (hidden if dtype == torch.float32 and groups == 1 else 0) + made
