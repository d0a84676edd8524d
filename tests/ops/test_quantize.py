"""Row-wise int8: the same bits natively and in torch, small errors, clear refusals."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from pyadapt.ops import routes
from pyadapt.ops.quantize import dequantize_rows_reference, quantize_rows_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
quantize_rows, dequantize_rows = torch.ops.pyadapt.quantize_rows, torch.ops.pyadapt.dequantize_rows


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (33, 515), (70, 1030), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_reference(isa, dtype, shape):
    w = torch.randn(shape).to(dtype)
    q, scale = quantize_rows(w)
    exact_q, exact_scale = quantize_rows_reference(w)
    assert q.dtype == torch.int8
    assert torch.equal(q, exact_q)
    assert torch.equal(scale, exact_scale)
    for out in DTYPES:
        assert torch.equal(dequantize_rows(q, scale, out), dequantize_rows_reference(q, scale, out))


def test_error_is_half_a_step(isa):
    w = torch.randn(20, 300)
    q, scale = quantize_rows(w)
    error = (dequantize_rows(q, scale, torch.float32) - w).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    assert (q.abs().amax(1) == 127).all()


def test_ties_go_to_even(isa):
    q, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_zero_and_tiny_rows(isa):
    q, scale = quantize_rows(torch.tensor([[0.0, -0.0], [1e-45, 0.0], [1.0, -1.0]]))
    assert q[0].tolist() == [0, 0]
    assert scale.isfinite().all()
    assert dequantize_rows(q, scale, torch.float32).isfinite().all()
    assert q[2].tolist() == [127, -127]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("route", ["fused", "reference"])
def test_refuses_nan_and_inf_by_row(bad, route):
    w = torch.ones(5, 700)
    w[3, 699] = bad
    with routes.forced(route), pytest.raises(ValueError, match="row 3"):
        quantize_rows(w)


def test_strided_weight(isa):
    w = torch.randn(9, 40)[:, 3:33]
    q, scale = quantize_rows(w)
    assert torch.equal(q, quantize_rows_reference(w)[0])
    assert_close(
        dequantize_rows(q.t().contiguous().t(), scale, torch.float32), q * scale[:, None], "store", torch.float32
    )


def test_float64(isa):
    w = torch.randn(9, 40).double()
    q, scale = quantize_rows(w)
    assert torch.equal(q, quantize_rows_reference(w)[0])
    assert dequantize_rows(q, scale, torch.float64).dtype == torch.float64


def test_opcheck():
    w = torch.randn(5, 12)
    torch.library.opcheck(quantize_rows.default, (w,))
    torch.library.opcheck(dequantize_rows.default, (*quantize_rows(w), torch.bfloat16))
