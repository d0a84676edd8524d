"""Quantising and dequantising on CUDA: the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from ops.test_lora import strided

from pyadapt.ops import quantize
from pyadapt.ops.kernels import cuda

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1, 1), (3, 5), (17, 64), (9, 130), (2, 1000), (0, 4), (4, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_quantise(place, dtype, shape):
    w = torch.randn(shape).to(dtype).to(place.device)
    if w.numel() > 10:
        w[0] = 0
    for given in (w, strided(w, 3)) if w.numel() else (w,):
        q, scale = cuda.quantize_rows(given)
        exact_q, exact_scale = quantize.quantize_rows_reference(w)
        assert torch.equal(q, exact_q)
        assert torch.equal(scale, exact_scale)


def test_rows_with_nan_or_inf(place):
    w = torch.randn(5, 40, device=place.device)
    w[1, 3], w[4, 39] = float("nan"), float("-inf")
    _, scale = cuda.quantize_rows(w)
    assert scale.isnan().tolist() == [False, True, False, False, True]


def test_the_op_refuses_them(place):
    w = torch.randn(5, 40, device=place.device, dtype=F16)
    w[2, 3] = float("inf")
    with pytest.raises(ValueError, match="row 2 holds a NaN or Inf"):
        torch.ops.pyadapt.quantize_rows(w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dequantise(place, dtype, shape):
    q = torch.randint(-127, 128, shape, dtype=torch.int8, device=place.device)
    scale = torch.rand(shape[0], device=place.device) / 50
    for given in (q, strided(q, 5)) if q.numel() else (q,):
        exact = quantize.dequantize_rows_reference(q, scale, dtype)
        assert torch.equal(cuda.dequantize_rows(given, scale, dtype), exact)
        assert torch.equal(cuda.dequantize_rows(given, None, dtype), q.to(dtype))
        assert torch.equal(cuda.dequantize_rows(given, None, dtype, 1 / 128), (q.float() / 128).to(dtype))
