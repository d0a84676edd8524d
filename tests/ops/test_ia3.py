"""IA3's ops and Functions against fp64 mathematics: every instruction set and route, l near 0, what is saved."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close, coarsest
from torch import nn

from ops.oracle import Owner, make_layer
from pyadapt import native
from pyadapt.ops import ia3, kernels, routes

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
FUNCTIONS = {"output": ia3.ScaledOutput, "input": ia3.ScaledInput}


def factors(side, layer, dtype=F32):
    """l as an adapter holds it: (N, 1) or (1, K)."""
    N, K = layer.weight.shape
    shape = (N, 1) if side == "output" else (1, K)
    return (0.5 + torch.rand(shape)).to(dtype)


def exact(side, layer, x, l, g):
    """((y, dx, dl), the sums of absolute values that they are made of) in fp64."""
    x, l, g, W = x.double(), l.double().flatten(), g.double(), layer.exact_weight()
    b = torch.zeros(()) if layer.bias is None else layer.bias.double()
    if side == "output":
        z = x @ W.t() + b
        values = z * l, (g * l) @ W, (g * z).sum(0)
        parts = (x.abs() @ W.abs().t()) * l.abs(), (g * l).abs() @ W.abs(), (g * z).abs().sum(0)
    else:
        z = g @ W
        values = (x * l) @ W.t() + b, z * l, (x * z).sum(0)
        parts = (x * l).abs() @ W.abs().t(), g.abs() @ W.abs() * l.abs(), (x * z).abs().sum(0)
    return values, parts


def run(side, layer, x, l, g, owner=None, out_dtype=None):
    """(y, dx, dl) of the Function under test."""
    x, l = x.detach().requires_grad_(), l.detach().requires_grad_()
    owner = owner or Owner(layer.weight, layer.weight_scale, layer.bias)
    y = FUNCTIONS[side].apply(x, l, owner, out_dtype or x.dtype)
    y.backward(g)
    return y.detach(), x.grad, l.grad


def assert_right(side, layer, x, l, g, **options):
    found = run(side, layer, x, l, g, **options)
    values, parts = exact(side, layer, x, l, g)
    dtype = coarsest(x.dtype, layer.weight.dtype, l.dtype, g.dtype)
    for what, value, wanted, part in zip(("y", "dx", "dl"), found, values, parts, strict=True):
        assert_close(value, wanted.view(value.shape), "product", dtype, f"{what} of the {side} side", part)
    assert found[2].dtype == l.dtype


@pytest.mark.parametrize("side", FUNCTIONS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M", [0, 1, 7, 130])
@pytest.mark.parametrize("weight_dtype", [F32, BF16, F16, I8], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_values(isa, dtype, weight_dtype, M, transposed, side):
    layer = make_layer(M, 75, 59, 0, dtype, weight_dtype, transposed=transposed)
    assert_right(side, layer, layer.x, factors(side, layer), layer.g)


@pytest.mark.parametrize("side", FUNCTIONS)
@pytest.mark.parametrize("route", ["fused", "library", "reference"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_dtype", [BF16, I8], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_routes(route, side, bias, weight_dtype, dtype):
    layer = make_layer(40, 75, 59, 0, dtype, dtype if weight_dtype == BF16 else I8, bias=bias)
    with routes.forced(route):
        assert_right(side, layer, layer.x, factors(side, layer), layer.g)


@pytest.mark.parametrize("side", FUNCTIONS)
def test_without_native_kernels(side, monkeypatch):
    monkeypatch.setattr(native, "core", lambda: None)
    native.isa.cache_clear()
    routes._pairs.clear()
    try:
        for dtype in (F32, BF16):
            layer = make_layer(20, 30, 25, 0, dtype)
            assert_right(side, layer, layer.x, factors(side, layer), layer.g)
    finally:
        native.isa.cache_clear()
        routes._pairs.clear()


@pytest.mark.parametrize("side", FUNCTIONS)
@pytest.mark.parametrize("l_dtype", [F32, BF16, torch.float64], ids=str)
def test_dtypes_of_l_and_y(side, l_dtype):
    layer = make_layer(20, 30, 25, 0, F32)
    assert_right(side, layer, layer.x, factors(side, layer, l_dtype), layer.g.bfloat16(), out_dtype=BF16)


@pytest.mark.parametrize("side", FUNCTIONS)
def test_gradcheck(side):
    layer = make_layer(3, 5, 4, 0, torch.float64)
    owner = Owner(layer.weight, None, layer.bias)
    l = factors(side, layer, torch.float64)
    l.view(-1)[1] = 0.0
    inputs = (layer.x.requires_grad_(), l.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, l: FUNCTIONS[side].apply(x, l, owner, torch.float64), inputs)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("route", ["fused", "library", "reference"])
@pytest.mark.parametrize("side", FUNCTIONS)
def test_leading_dimensions(side, route, shape):
    layer = make_layer(6, 10, 12, 0, BF16)
    x, g = torch.randn(*shape, 10).to(BF16), torch.randn(*shape, 12).to(BF16)
    with routes.forced(route):
        y, dx, dl = run(side, layer, x, l := factors(side, layer), g)
    assert (y.shape, dx.shape) == (g.shape, x.shape)
    values, parts = exact(side, layer, x.view(-1, 10), l, g.view(-1, 12))
    for value, wanted, part in zip((y, dx, dl), values, parts, strict=True) if x.numel() else ():
        assert_close(value, wanted.view(value.shape), "product", BF16, part=part)


@pytest.mark.parametrize("side", FUNCTIONS)
def test_rows_with_gaps_and_expanded_gradients(side):
    layer = make_layer(12, 30, 25, 0)
    x = torch.randn(6, 2, 60)[..., ::2].transpose(0, 1).requires_grad_()
    l = factors(side, layer).requires_grad_()
    FUNCTIONS[side].apply(x, l, Owner(layer.weight, None, layer.bias), F32).sum().backward()
    values, parts = exact(side, layer, x.detach().reshape(12, 30), l.detach(), torch.ones(12, 25))
    assert_close(x.grad, values[1].view(x.shape), "product", F32, part=parts[1])
    assert_close(l.grad, values[2].view(l.shape), "product", F32, part=parts[2])


# --- near l = 0 ---


@pytest.mark.parametrize("value", [0.0, 1e-8, -1e-30, 1e-38, 1e-44])
@pytest.mark.parametrize("where", ["one", "all"])
@pytest.mark.parametrize("weight_dtype", [F32, I8], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("route", ["fused", "library", "reference"])
def test_near_zero(route, dtype, weight_dtype, where, value):
    """The gradient of l is that of the product itself, however small l is."""
    layer = make_layer(33, 20, 17, 0, dtype, dtype if weight_dtype == F32 else I8)
    l = factors("output", layer)
    l[slice(None) if where == "all" else 3] = value
    with routes.forced(route):
        _, _, dl = run("output", layer, layer.x, l, layer.g)
    values, parts = exact("output", layer, layer.x, l, layer.g)
    assert_close(dl, values[2].view(dl.shape), "product", dtype, "dl", parts[2])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_just_above_the_threshold(dtype, scale):
    """Where y is used, y / l has kept the digits of the product, also of a small one."""
    layer = make_layer(64, 20, 17, 0, dtype)
    l = torch.full((17, 1), 1.001 * ia3.least_factor(dtype))
    x, layer.bias[:] = layer.x * scale, 0
    g = layer.g * scale
    _, _, dl = run("output", layer, x, l, g)
    values, parts = exact("output", layer, x, l, g)
    assert_close(dl, values[2].view(dl.shape), "product", dtype, "dl", parts[2])


def test_thresholds():
    """2^-4 where 16 bits underflow early, else where a product of two values would be subnormal."""
    found = {dtype: ia3.least_factor(dtype) for dtype in (F16, BF16, F32, torch.float64)}
    assert found == {F16: 2.0**-4, BF16: 2.0**-63, F32: 2.0**-63, torch.float64: 2.0**-511}


@pytest.mark.parametrize("value", [0.0, 1e-8, 1e-30])
def test_the_input_side_needs_no_quotient(value):
    layer = make_layer(33, 20, 17, 0)
    l = factors("input", layer)
    l[:, 3] = value
    assert_right("input", layer, layer.x, l, layer.g)


# --- in place behind the layer ---


@pytest.mark.parametrize("route", ["fused", "library", "reference"])
@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=str)
@pytest.mark.parametrize("side", FUNCTIONS)
def test_the_output_may_be_changed_in_place(side, shape, route):
    """As behind a plain linear layer: dl is not read off what is no longer the layer's output."""
    layer = make_layer(12, 20, 17, 0, BF16)
    l = factors(side, layer).requires_grad_()
    x = layer.x.view(*shape, 20).clone().requires_grad_()
    with routes.forced(route):
        y = FUNCTIONS[side].apply(x, l, Owner(layer.weight, None, layer.bias), BF16)
        mask = (y > 0).view(12, 17)
        nn.functional.relu(y, inplace=True).backward(layer.g.view(*shape, 17))
    values, parts = exact(side, layer, layer.x, l.detach(), layer.g * mask)
    assert_close(l.grad, values[2].view(l.shape), "product", BF16, "dl", parts[2])
    assert_close(x.grad, values[1].view(x.shape), "product", BF16, "dx", parts[1])


def test_a_change_in_place_is_seen_by_the_version_alone():
    """The shadow holds no memory of y, and a change after the backward, or none, costs no second product."""
    layer = make_layer(12, 20, 17, 0)
    owner = Owner(layer.weight, None, layer.bias)
    y = ia3.ScaledOutput.apply(layer.x.requires_grad_(), factors("output", layer).requires_grad_(), owner, F32)
    watch = y.grad_fn.saved[3]
    assert watch.shadow.untyped_storage().nbytes() == 0
    assert not watch.changed()
    with torch.no_grad():
        y.add_(1)
    assert watch.changed()


# --- what is saved ---


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = function()
    return result, saved


@pytest.mark.parametrize("route", ["fused", "library", "reference"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("side", FUNCTIONS)
def test_nothing_is_saved_beside_x_and_y(side, dtype, route):
    layer = make_layer(12, 50, 41, 0, dtype)
    l = factors(side, layer).requires_grad_()
    x = layer.x.view(3, 4, 50).requires_grad_()
    with routes.forced(route):
        y, saved = saved_by(lambda: FUNCTIONS[side].apply(x, l, Owner(layer.weight, None, layer.bias), dtype))
    known = {tensor.untyped_storage().data_ptr() for tensor in ((x, l, y) if side == "output" else (x, l))}
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} == known
    assert sum(tensor.nbytes for tensor in saved) == x.nbytes + l.nbytes + (y.nbytes if side == "output" else 0)


@pytest.mark.parametrize("side", FUNCTIONS)
def test_a_frozen_l_saves_itself_alone(side):
    layer = make_layer(12, 50, 41, 0)
    l = factors(side, layer)
    x = layer.x.requires_grad_()
    y, saved = saved_by(lambda: FUNCTIONS[side].apply(x, l, Owner(layer.weight, None, layer.bias), F32))
    assert [tensor.data_ptr() for tensor in saved] == [l.data_ptr()]
    y.backward(layer.g)
    values, parts = exact(side, layer, x.detach(), l, layer.g)
    assert_close(x.grad, values[1], "product", F32, part=parts[1])


@pytest.mark.parametrize("side", FUNCTIONS)
def test_input_without_gradient(side):
    layer = make_layer(6, 10, 12, 0)
    l = factors(side, layer).requires_grad_()
    FUNCTIONS[side].apply(layer.x, l, Owner(layer.weight, None, layer.bias), F32).backward(layer.g)
    values, parts = exact(side, layer, layer.x, l.detach(), layer.g)
    assert_close(l.grad, values[2].view(l.shape), "product", F32, part=parts[2])


@pytest.mark.parametrize("side", FUNCTIONS)
def test_the_weight_is_asked_for_again_in_backward(side):
    layer = make_layer(12, 50, 41, 0)
    owner = Owner(layer.weight, None, layer.bias)
    x, l = layer.x.requires_grad_(), factors(side, layer).requires_grad_()
    y = FUNCTIONS[side].apply(x, l, owner, F32)
    owner.weight = layer.weight.clone()
    y.backward(layer.g)
    assert owner.asked == 2


@pytest.mark.parametrize("side", FUNCTIONS)
def test_double_backward_says_that_it_does_not_work(side):
    layer = make_layer(6, 10, 12, 0)
    x, l = layer.x.requires_grad_(), factors(side, layer).requires_grad_()
    y = FUNCTIONS[side].apply(x, l, Owner(layer.weight, None, layer.bias), F32)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("side", FUNCTIONS)
def test_checkpointing(side, in_place, reentrant):
    layer = make_layer(12, 50, 41, 0)
    owner = Owner(layer.weight, None, layer.bias)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x, l = layer.x.clone().requires_grad_(), factors(side, layer).requires_grad_()

        def call(x, l=l):
            return nn.functional.relu(FUNCTIONS[side].apply(x, l, owner, F32), inplace=in_place) * 2.0

        y = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)
        y.backward(layer.g)
        grads.append((x.grad, l.grad))
    for plain, again in zip(*grads, strict=True):
        assert_close(again, plain.double(), "product", F32)


def test_saved_tensors_on_another_place():
    layer = make_layer(12, 50, 41, 0)
    x, l = layer.x.requires_grad_(), factors("output", layer).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y = ia3.ScaledOutput.apply(x, l, Owner(layer.weight, None, layer.bias), F32)
    nn.functional.relu(y, inplace=True).backward(layer.g)
    exact_y = exact("output", layer, x.detach(), l.detach(), layer.g)[0][0]
    values, parts = exact("output", layer, x.detach(), l.detach(), layer.g * (exact_y > 0))
    assert_close(l.grad, values[2].view(l.shape), "product", F32, part=parts[2])


# --- compiled, and as ops ---


@pytest.mark.parametrize("weight_dtype", [F32, I8], ids=str)
def test_opcheck(weight_dtype):
    layer = make_layer(40, 10, 12, 0, F32, weight_dtype)
    weight = (layer.weight, layer.weight_scale)
    rows, columns = torch.rand(12) + 0.5, torch.rand(10) + 0.5
    ops = torch.ops.pyadapt
    torch.library.opcheck(ops.ia3_output_forward.default, (layer.x, *weight, layer.bias, rows, BF16))
    torch.library.opcheck(ops.ia3_input_forward.default, (layer.x, *weight, layer.bias, columns, BF16))
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.ia3_input_backward.default, (layer.g, layer.x, *weight, columns, *flags))
        for y in (layer.g * 2, None):
            arguments = (layer.g, layer.x, y, *weight, layer.bias, rows, *flags)
            torch.library.opcheck(ops.ia3_output_backward.default, arguments)


class Adapted(nn.Linear):
    """A toy layer in the shape of the library's own: unit called with the layer, weight read from it."""

    def __init__(self, K, N, side):
        super().__init__(K, N)
        self.requires_grad_(False)
        self.side = side
        self.l = nn.Parameter(torch.rand((N, 1) if side == "output" else (1, K)) + 0.5)

    def operands(self):
        return self.weight, None, self.bias

    def forward(self, x):
        return FUNCTIONS[self.side].apply(x, self.l, self, x.dtype)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_whole(backend, in_place):
    model = nn.Sequential(Adapted(10, 12, "output"), nn.ReLU(in_place), Adapted(12, 7, "input"), nn.ReLU(in_place))
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(2, 5, 10, requires_grad=True)

    def gradients(run):
        return torch.autograd.grad(run(x).square().sum(), [x, *trained])

    eager = gradients(model)
    for value, wanted in zip(gradients(torch.compile(model, fullgraph=True, backend=backend)), eager, strict=True):
        assert_close(value, wanted, "product", F32)


def test_autocast_does_not_reach_into_the_op():
    for side in FUNCTIONS:
        layer = make_layer(40, 10, 12, 0)
        l = factors(side, layer)
        plain = run(side, layer, layer.x, l, layer.g)
        with torch.autocast("cpu", dtype=BF16):
            inside = run(side, layer, layer.x, l, layer.g)
        assert all(torch.equal(*pair) for pair in zip(plain, inside, strict=True))


# --- the native pass ---


@pytest.mark.parametrize(("M", "N"), [(0, 5), (1, 1), (3, 17), (130, 75), (70, 4100), (1000, 33), (5, 9000)])
@pytest.mark.parametrize("b_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_scale_columns(isa, dtype, b_dtype, M, N):
    a, b, scale, shift = torch.randn(M, N).to(dtype), torch.randn(M, N).to(b_dtype), torch.randn(N), torch.randn(N)
    wide, dots = a.double() * scale.double(), a.double() * b.double()
    assert_close(kernels.cpu.scale_columns(a, scale), wide, "store", dtype)
    shifted = kernels.cpu.scale_columns(a, scale, shift, torch.empty(M, N, dtype=b_dtype))
    assert_close(shifted, wide + shift.double(), "product", b_dtype, part=shift)
    parts = dots.abs().sum(0)
    assert_close(kernels.cpu.scale_columns_dot(a, b), dots.sum(0), "product", F32, part=parts)
    found = kernels.cpu.scale_columns_dot(a, b, scale, a)
    assert_close(found, dots.sum(0), "product", F32, part=parts)
    assert_close(a, wide, "store", dtype)


def test_the_same_bits_for_any_number_of_threads(needs_native):
    a, b = torch.randn(700, 300), torch.randn(700, 300)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(kernels.cpu.scale_columns_dot(a, b))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"a": torch.zeros(3, 4, dtype=I8)}, TypeError, "a is int8"),
        ({"scale": torch.zeros(5)}, ValueError, r"scale has shape \(5,\); wanted \(N,\) = \(4,\)"),
        ({"scale": torch.zeros(4, dtype=BF16)}, TypeError, "scale is bfloat16; wanted float32"),
        ({"shift": torch.zeros(3)}, ValueError, "shift has shape"),
        ({"b": torch.zeros(3, 5)}, ValueError, "b has shape"),
        ({"b": None}, ValueError, "b and dot belong together"),
        ({"dot": torch.zeros(3)}, ValueError, "dot has shape"),
        ({"out": torch.zeros(4).expand(3, 4)}, ValueError, "rows that do not overlap"),
        ({"threads": 0}, ValueError, "threads is 0"),
    ],
)
def test_bad_arguments_of_the_native_pass(needs_native, changes, error, match):
    arguments = {
        "a": torch.zeros(3, 4),
        "scale": torch.zeros(4),
        "shift": torch.zeros(4),
        "b": torch.zeros(3, 4),
        "out": torch.zeros(3, 4),
        "dot": torch.zeros(4),
        "threads": 1,
        **changes,
    }
    with pytest.raises(error, match=match):
        native.core().scale_columns(*arguments.values())


def test_bad_input_scale(needs_native):
    with pytest.raises(ValueError, match=r"input_scale has shape \(3,\); wanted \(K,\) = \(4,\)"):
        native.core().scaled_linear_forward(
            torch.zeros(2, 4), torch.zeros(3), torch.zeros(5, 4), None, None, torch.zeros(2, 5), False, 1
        )
