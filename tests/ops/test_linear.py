"""The frozen layer's forward and dx against fp64 mathematics."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from ops.oracle import make_layer
from pyadapt.ops import routes

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M", [0, 1, 2, 7, 33, 130])
@pytest.mark.parametrize("weight_dtype", [F32, BF16, F16, I8], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_values(isa, dtype, weight_dtype, M, transposed):
    layer = make_layer(M, 75, 59, 0, dtype, weight_dtype, transposed=transposed)
    y = torch.ops.pyadapt.linear_forward(layer.x, layer.weight, layer.weight_scale, layer.bias, dtype)
    dx = torch.ops.pyadapt.linear_dx(layer.g, layer.weight, layer.weight_scale, dtype)
    assert_close(y, layer.exact_forward()[0], "product", dtype, "y")
    assert_close(dx, layer.g.double() @ layer.exact_weight(), "product", dtype, "dx")


@pytest.mark.parametrize("route", ["fused", "library", "reference"])
@pytest.mark.parametrize("weight_dtype", [BF16, I8], ids=str)
def test_routes_agree(route, weight_dtype):
    layer = make_layer(40, 75, 59, 0, BF16, weight_dtype)
    with routes.forced(route):
        y = torch.ops.pyadapt.linear_forward(layer.x, layer.weight, layer.weight_scale, layer.bias, F32)
        dx = torch.ops.pyadapt.linear_dx(layer.g, layer.weight, layer.weight_scale, F32)
    assert_close(y, layer.exact_forward()[0], "product", BF16, "y")
    assert_close(dx, layer.g.double() @ layer.exact_weight(), "product", BF16, "dx")


@pytest.mark.parametrize("weight_dtype", [F32, I8], ids=str)
def test_opcheck(weight_dtype):
    layer = make_layer(40, 10, 12, 0, F32, weight_dtype)
    weight = (layer.weight, layer.weight_scale)
    torch.library.opcheck(torch.ops.pyadapt.linear_forward.default, (layer.x, *weight, layer.bias, BF16))
    torch.library.opcheck(torch.ops.pyadapt.linear_dx.default, (layer.g, *weight, BF16))
