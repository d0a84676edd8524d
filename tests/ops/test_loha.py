"""The two forms of a Hadamard product of products against fp64 mathematics."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from ops.oracle import Owner, make_layer
from pyadapt import native
from pyadapt.ops import loha
from pyadapt.ops.lora import LoraLinear

F64, F32, BF16, F16, I8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8
# M, K, N, r: none a multiple of a panel or a tile.
SHAPES = [(1, 1, 1, 1), (3, 7, 9, 2), (33, 100, 65, 4), (70, 31, 130, 9)]


def factors_of(K, N, r, dtype=F32):
    torch.manual_seed(2)
    shapes = (N, r), (r, K), (N, r), (r, K)
    return [torch.randn(shape, dtype=F64).to(dtype).requires_grad_() for shape in shapes]


def exact_delta(four, mask=None):
    w1a, w1b, w2a, w2b = (w.detach().double() for w in four)
    D = (w1a @ w1b) * (w2a @ w2b)
    return D if mask is None else mask.double()[:, None] * D


def exact_gradients(four, T, mask=None):
    """Of the factors, for the gradient T of mask * D."""
    T = T if mask is None else mask.double()[:, None] * T
    w1a, w1b, w2a, w2b = (w.detach().double() for w in four)
    E1, E2 = T * (w2a @ w2b), T * (w1a @ w1b)
    return E1 @ w1b.t(), w1a.t() @ E1, E2 @ w2b.t(), w2a.t() @ E2


def mask_of(N, wanted):
    return (torch.arange(N) % 3 > 0).float() * 1.5 if wanted else None


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch):
    """Several panels, and a last one that is not full."""
    monkeypatch.setattr(loha, "_PANEL_ELEMENTS", 64 * 48)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_khatri_rao(isa, shape, dtype, masked):
    _, K, N, r = shape
    four, mask = factors_of(K, N, r, F64 if dtype == F64 else F32), mask_of(N, masked)
    s = 0.75
    A, B = loha.KhatriRao.apply(*four, mask, s, dtype)
    assert (A.shape, B.shape) == ((r * r, K), (N, r * r))
    assert A.dtype == B.dtype == dtype
    w1a, w1b, w2a, w2b = (w.detach().double() for w in four)
    rows = s * (w1a if mask is None else w1a * mask.double()[:, None])
    # Two factors are multiplied, the scaling and the mask once before.
    assert_close(A, torch.einsum("ik,jk->ijk", w1b, w2b).flatten(0, 1), "product", dtype)
    assert_close(B, torch.einsum("ni,nj->nij", rows, w2a).flatten(1), "product", dtype)
    exact = s * exact_delta(four, mask)
    if dtype != BF16:
        assert_close(B @ A, exact, "product", dtype)
    dA, dB = torch.randn(r * r, K).to(dtype), torch.randn(N, r * r).to(dtype)
    torch.autograd.backward((A, B), (dA, dB))
    dA3, dB3 = dA.double().view(r, r, K), s * dB.double().view(N, r, r)
    dB3 = dB3 if mask is None else dB3 * mask.double()[:, None, None]
    expected = (
        torch.einsum("nij,nj->ni", dB3, w2a),
        torch.einsum("ijk,jk->ik", dA3, w2b),
        torch.einsum("nij,ni->nj", dB3, w1a),
        torch.einsum("ijk,ik->jk", dA3, w1b),
    )
    for w, gradient in zip(four, expected, strict=True):
        assert w.grad.dtype == w.dtype
        assert_close(w.grad, gradient, "product", w.dtype)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_khatri_rao_of_16_bit_factors(dtype):
    """Multiplied in fp32, rounded once."""
    four = factors_of(12, 10, 3, dtype)
    A, _ = loha.KhatriRao.apply(*four, None, 1.0, F32)
    exact = torch.einsum("ik,jk->ijk", four[1].detach().double(), four[3].detach().double()).flatten(0, 1)
    assert_close(A, exact, "store", F32)
    A.sum().backward()
    assert four[1].grad.dtype == dtype


def test_khatri_rao_gives_the_same_bits_for_any_number_of_threads(isa):
    four, mask = factors_of(700, 900, 8), mask_of(900, True)
    dA, dB = torch.randn(64, 700), torch.randn(900, 64)

    def results():
        leaves = [w.detach().requires_grad_() for w in four]
        made = loha.KhatriRao.apply(*leaves, mask, 0.5, F32)
        torch.autograd.backward(made, (dA, dB))
        return [*made, *(leaf.grad for leaf in leaves)]

    alone = results()
    torch.set_num_threads(3)
    assert all(map(torch.equal, results(), alone))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"w1b": (3, 7)}, r"w1a has shape \(9, 2\); wanted \(N, r1\) = \(9, 3\)"),
        ({"w2a": (9, 3)}, "w2a"),
        ({"rows": (8,)}, "factors"),
    ],
    ids=str,
)
def test_native_refuses_what_does_not_fit(needs_native, wrong, message):
    shapes = {"w1a": (9, 2), "w1b": (2, 7), "w2a": (9, 2), "w2b": (2, 7), "rows": (9,), **wrong}
    w1a, w1b, w2a, w2b, rows = (torch.randn(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        native.core().khatri_rao(w1a, w1b, w2a, w2b, rows, torch.empty(4, 7), torch.empty(9, 4), 1.0, 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(F64, F64), *((x, W) for x in (F32, BF16, F16) for W in (F32, BF16, F16, I8))], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiled(shape, dtype, weight_dtype, masked):
    M, K, N, r = shape
    layer = make_layer(M, K, N, 1, dtype, weight_dtype)
    four, mask = factors_of(K, N, r, F64 if dtype == F64 else F32), mask_of(N, masked)
    W, s = layer.exact_weight(), 0.75
    D = s * exact_delta(four, mask)
    x, g = layer.x.clone().requires_grad_(), layer.g
    owner = Owner(layer.weight, layer.weight_scale, layer.bias)
    y = loha.TiledHadamard.apply(x, *four, mask, None, owner, s, dtype)
    assert y.dtype == dtype
    x64, g64 = layer.x.double(), g.double()
    assert_close(y, x64 @ (W + D).t() + layer.bias.double(), "product", dtype, part=x64 @ W.t())
    y.backward(g)
    assert_close(x.grad, g64 @ (W + D), "product", dtype, part=g64 @ W)
    # The products of an fp16 x are in fp32.
    sums = BF16 if dtype == BF16 else four[0].dtype
    for w, gradient in zip(four, exact_gradients(four, s * g64.t() @ x64, mask), strict=True):
        assert_close(w.grad, gradient, "product", sums)
    assert owner.asked == 2


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_tiled_adds_to_another_output(dtype):
    four = factors_of(31, 65, 3, F64 if dtype == F64 else F32)
    x, before = torch.randn(2, 5, 31).to(dtype).requires_grad_(), torch.randn(2, 5, 65).to(dtype).requires_grad_()
    kept = before.detach().clone()
    y = loha.TiledHadamard.apply(x, *four, None, before, None, 0.5, dtype)
    D = 0.5 * exact_delta(four)
    x64 = x.detach().double()
    assert_close(y, kept.double() + x64 @ D.t(), "product", dtype)
    assert torch.equal(before, kept)
    g = torch.randn(2, 5, 65).to(dtype)
    y.backward(g)
    assert torch.equal(before.grad, g)
    assert_close(x.grad, g.double() @ D, "product", dtype)


@pytest.mark.parametrize("form", ["khatri-rao", "tiled"])
@pytest.mark.parametrize("need_dx", [True, False])
def test_gradcheck(form, need_dx):
    layer = make_layer(4, 5, 6, 1, F64)
    owner, mask = Owner(layer.weight, None, layer.bias), mask_of(6, True)
    x = layer.x.clone().requires_grad_(need_dx)

    def run(x, *four):
        if form == "tiled":
            return loha.TiledHadamard.apply(x, *four, mask, None, owner, 0.5, F64)
        A, B = loha.KhatriRao.apply(*four, mask, 0.5, F64)
        return LoraLinear.apply(x, A, B, owner, 1.0, 0.0, None, F64)

    assert torch.autograd.gradcheck(run, (x, *factors_of(5, 6, 2, F64)))


def test_the_forms_agree():
    layer = make_layer(40, 70, 90, 1)
    owner, four = Owner(layer.weight, None, layer.bias), factors_of(70, 90, 3)
    A, B = loha.KhatriRao.apply(*four, None, 0.5, F32)
    low = LoraLinear.apply(layer.x, A, B, owner, 1.0, 0.0, None, F32)
    tiled = loha.TiledHadamard.apply(layer.x, *four, None, None, owner, 0.5, F32)
    assert_close(tiled, low.double(), "product", F32)


def test_opcheck():
    layer = make_layer(5, 7, 9, 1, BF16, I8)
    four = [w.detach() for w in factors_of(7, 9, 2)]
    mask = mask_of(9, True)
    ops = torch.ops.pyadapt
    A, B = ops.khatri_rao(*four, mask, 0.5, BF16)
    torch.library.opcheck(ops.khatri_rao.default, (*four, mask, 0.5, BF16))
    torch.library.opcheck(ops.khatri_rao_backward.default, (A, B, *four, mask, 0.5))
    W = layer.weight, layer.weight_scale
    torch.library.opcheck(ops.loha_forward.default, (layer.x, *W, layer.bias, *four, mask, 0.5, None, BF16))
    torch.library.opcheck(ops.loha_forward.default, (layer.x, None, None, None, *four, None, 0.5, layer.g, BF16))
    for need_dx in (True, False):
        torch.library.opcheck(ops.loha_backward.default, (layer.g, layer.x, *W, *four, mask, 0.5, need_dx))
