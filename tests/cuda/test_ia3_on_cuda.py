"""IA3 on the CUDA kernels: they scale the columns of an int8 weight, and torch the rest."""

from __future__ import annotations

import pytest
import torch
from ops.oracle import make_layer
from ops.test_ia3 import FUNCTIONS, assert_right, factors

from pyadapt.ops import routes


@pytest.mark.parametrize("side", FUNCTIONS)
@pytest.mark.parametrize("route", ["fused", "library", "reference"])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("M", [5, 33])
def test_values(place, M, weight_dtype, route, side):
    layer = make_layer(M, 64, 48, 0, torch.float16, weight_dtype).to(place.device)
    l = factors(side, layer).to(place.device)
    l.view(-1)[2] = 0.0
    with routes.forced(route):
        assert_right(side, layer, layer.x, l, layer.g)


@pytest.mark.parametrize("side", FUNCTIONS)
def test_fp32(place, side):
    layer = make_layer(20, 30, 25, 0).to(place.device)
    assert_right(side, layer, layer.x, factors(side, layer).to(place.device), layer.g)
