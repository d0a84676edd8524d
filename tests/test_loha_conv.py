"""LoHa on convolutions: shapes, routes, what is kept, and a fault of peft. The rest: `test_lycoris_conv.py`."""

from __future__ import annotations

import pytest
import torch
from lycoris_cases import LOHA_CONVS, among, chosen, data, exact, kept_beside, twin_of, wrapped
from models import assert_near
from torch import nn

import pyadapt
from pyadapt import LoHaConfig

FLAT, WITH_DELTA, EFFECTIVE, _ = LOHA_CONVS


@pytest.fixture
def case(request, monkeypatch):
    return chosen(request, monkeypatch)


def test_peft_mixes_up_the_gradients_of_the_effective_form():
    """Why its gradients of w*_a are no oracle there: in its backward each gets the other's t and w_b."""
    model, x = wrapped(EFFECTIVE), data(2)
    twin = twin_of(EFFECTIVE, model)
    y = model(x)
    y.square().sum().backward()
    twin(x).square().sum().backward()
    ours = model[0].unit("default").hada_w1_a.grad
    assert not torch.allclose(twin.base_model.model[0].hada_w1_a["default"].grad, ours, atol=1e-3)
    assert_near(ours, exact(model, x, 2 * y.detach())[2]["hada_w1_a"].float(), "gradient")


def test_shapes_and_route_are_planned():
    config = LoHaConfig(target_modules=["0", "1", "2"], r=3, use_effective_conv2d=True)
    layers = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (1, 3), groups=2), nn.Conv2d(4, 6, 1))
    rows = pyadapt.plan(layers, config).layers
    assert rows[0].shapes["hada_t1"] == (3, 3, 3, 1)
    assert rows[1].shapes["hada_t2"] == (3, 3, 1, 3)
    assert rows[1].shapes["hada_w1_b"] == (3, 2)
    assert rows[1].shapes["hada_w1_a"] == (3, 6)
    # One place: nothing to take apart.
    assert rows[2].shapes["hada_w1_a"] == (6, 3)
    assert "hada_t1" not in rows[2].shapes
    wide = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=2))
    kernels = [row.kernel for row in pyadapt.plan(wide, LoHaConfig(r=4, target_modules=["0", "1"])).layers]
    assert kernels == ["khatri-rao, convolutions", "convolution with dW"]
    assert pyadapt.plan(wide, LoHaConfig(r=16, target_modules=["0"])).layers[0].kernel == "convolution with dW"


@among([FLAT, WITH_DELTA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_a_cast_input_nor_dW_is_kept(case, dtype):
    model = wrapped(case, dtype=dtype).train()
    x = torch.randn(4, 8, 16, 16).to(dtype).requires_grad_()
    beside = kept_beside(model, x, model[0].weight)
    # r^2 hidden channels with their factors; else w1_a with the scaling in it.
    hidden = 4 * (4 * 14 * 14 + 8 * 9 + 12) * dtype.itemsize
    assert beside <= (hidden if case is FLAT else 0) + 12 * 2 * 4
