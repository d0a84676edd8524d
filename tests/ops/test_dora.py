"""The norm of the moved weight's rows, and the scaling of output features."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from pyadapt.ops.dora import ScaleFeatures, row_norms_reference
from pyadapt.ops.linear import dense

KINDS = ("fp32", "bf16", "fp16", "fp64", "int8", "transposed")


def weights(kind, n=37, k=53):
    W = torch.randn(n, k, dtype=torch.float64)
    if kind == "int8":
        return torch.ops.pyadapt.quantize_rows(W.float())
    if kind == "transposed":
        return W.float().t().contiguous().t(), None
    return W.to(
        {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[kind]
    ), None


def exact_norms(weight, scale, A, B, s):
    return (dense(weight, scale, torch.float64) + s * (B.double() @ A.double())).norm(dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 5, 64])
def test_against_fp64(kind, r):
    weight, scale = weights(kind)
    dtype = torch.float64 if kind == "fp64" else torch.float32
    A, B = torch.randn(r, 53, dtype=dtype), torch.randn(37, r, dtype=dtype)
    norms = torch.ops.pyadapt.row_norms(weight, scale, A, B, 0.7)
    assert norms.dtype == dtype
    assert_close(norms, exact_norms(weight, scale, A, B, 0.7), "product", dtype)
    assert_close(row_norms_reference(weight, scale, A, B, 0.7), norms, "product", dtype)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "transposed"])
@pytest.mark.parametrize("left", [0.1, 1e-2, 1e-3])
def test_where_the_adapter_nearly_cancels_the_weight(kind, left):
    """W is of rank 3 and s B A takes all of it away but `left`: the expanded square has no digit left at 1e-3."""
    L, R = torch.randn(37, 3), torch.randn(3, 53)
    weight, scale = L @ R, None
    if kind == "bf16":
        weight = weight.bfloat16()
    elif kind == "int8":
        weight, scale = torch.ops.pyadapt.quantize_rows(weight)
    elif kind == "transposed":
        weight = weight.t().contiguous().t()
    B = -(1 - left) * L
    exact = exact_norms(weight, scale, R, B, 1.0)
    part = dense(weight, scale, torch.float64).norm(dim=1)
    # What fp32 can hold of a difference of two such weights, on which the floor of the table rests.
    assert_close(torch.ops.pyadapt.row_norms(weight, scale, R, B, 1.0), exact, "product", torch.float32, part=part)
    assert (exact < 0.2 * part).all()


def test_rows_are_never_negative_or_lost():
    W = torch.randn(300, 1024)
    A = torch.eye(1024)[:8]
    B = -W[:, :8].contiguous()
    W[:, 8:] = 0
    assert torch.equal(torch.ops.pyadapt.row_norms(W, None, A, B, 1.0), torch.zeros(300))


@pytest.mark.parametrize("shape", [(700, 1100), (1, 300_000), (3, 1), (1, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_panels_cover_every_row(shape, transposed):
    n, k = shape
    W, A, B = torch.randn(n, k), torch.randn(2, k), torch.randn(n, 2)
    W = W.t().contiguous().t() if transposed else W
    assert_close(
        torch.ops.pyadapt.row_norms(W, None, A, B, 2.0), exact_norms(W, None, A, B, 2.0), "product", torch.float32
    )


def test_opcheck():
    q, scale = weights("int8")
    A, B = torch.randn(4, 53), torch.randn(37, 4)
    for weight, of in ((q, scale), (torch.randn(37, 53), None)):
        torch.library.opcheck(torch.ops.pyadapt.row_norms.default, (weight, of, A, B, 0.5))


def test_autocast_does_not_round_the_norm():
    W, A, B = torch.randn(37, 53), torch.randn(4, 53), torch.randn(37, 4)
    with torch.autocast("cpu", torch.bfloat16):
        norms = torch.ops.pyadapt.row_norms(W, None, A, B, 1.0)
    assert_close(norms, exact_norms(W, None, A, B, 1.0), "product", torch.float32)


@pytest.mark.parametrize(("shape", "dim"), [((4, 3, 5), -1), ((2, 5, 3, 3), 1), ((5,), 0), ((5, 3), -2)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scaling_features_gradcheck(shape, dim, with_bias):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    c = torch.randn(5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True) if with_bias else None
    assert torch.autograd.gradcheck(lambda *args: ScaleFeatures.apply(*args, dim), (z, c, bias))


def test_scaling_features_rounds_once():
    """In fp32 until stored: c is not rounded to bf16 first."""
    z, c, bias = torch.randn(64, 33).bfloat16(), 1 + torch.rand(33) / 100, torch.randn(33).bfloat16()
    y = ScaleFeatures.apply(z, c, bias)
    assert y.dtype == torch.bfloat16
    assert_close(y, z.double() * c.double() + bias.double(), "store", torch.bfloat16)
