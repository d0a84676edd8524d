"""The way past torch's dispatcher: taken when nobody looks on, with the same bits, and not otherwise."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ops.oracle import Owner, make_layer
from pyadapt.ops import registry, routes
from pyadapt.ops.kernels import cpu as kernels
from pyadapt.ops.linear import FrozenLinear
from pyadapt.ops.lora import LoraLinear

pytestmark = pytest.mark.usefixtures("needs_native")
F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8
KERNELS = ("lora_forward", "lora_backward", "linear_forward", "linear_dx")
LORA_OPS = ["pyadapt::lora_forward", "pyadapt::lora_backward"]


@pytest.fixture
def direct(monkeypatch):
    """The kernels that were called without the dispatcher, by name: an op goes through ``routes.run``."""
    called, in_op = [], []

    def watch(name):
        kernel = getattr(kernels, name)

        def watched(*arguments):
            if not in_op:
                called.append(name)
            return kernel(*arguments)

        monkeypatch.setattr(kernels, name, watched)

    def run(*arguments, run=routes.run):
        in_op.append(True)
        try:
            return run(*arguments)
        finally:
            in_op.pop()

    for name in KERNELS:
        watch(name)
    monkeypatch.setattr(routes, "run", run)
    return called


class Seen(TorchDispatchMode):
    """The names of this library's ops that went by."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "pyadapt":
            self.ops.append(op.name())
        return op(*args, **(kwargs or {}))


def lora(layer, x=None):
    """y and the gradients of x, A and B."""
    owner = Owner(layer.weight, layer.weight_scale, layer.bias)
    leaves = [tensor.clone().requires_grad_() for tensor in (layer.x if x is None else x, layer.A, layer.B)]
    y = LoraLinear.apply(*leaves, owner, layer.scaling, layer.dropout_p, layer.seed, layer.x.dtype)
    return y, *torch.autograd.grad(y, leaves, layer.g.view(y.shape))


def frozen(layer, x=None):
    """y and the gradient of x."""
    owner = Owner(layer.weight, layer.weight_scale, layer.bias)
    x = (layer.x if x is None else x).clone().requires_grad_()
    y = FrozenLinear.apply(x, owner, layer.x.dtype)
    return y, *torch.autograd.grad(y, [x], layer.g.view(y.shape))


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("M", [0, 1, 12, 40])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, I8], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_direct_way_gives_the_bits_of_the_op(isa, direct, M, dtype, weight_dtype, transposed):
    layer = make_layer(M, 50, 41, 4, dtype, weight_dtype, transposed=transposed).with_dropout(0.2)
    for step, used in ((lora, KERNELS[:2]), (frozen, KERNELS[2:])):
        plain = step(layer)
        assert direct == list(used)
        with Seen() as seen:
            through = step(layer)
        assert [op.removeprefix("pyadapt::") for op in seen.ops] == list(used)
        assert direct == list(used)
        assert same(plain, through)
        direct.clear()


@pytest.mark.parametrize("shape", [(12, 50), (3, 4, 50), (2, 3, 2, 50), (12, 1, 50)], ids=str)
@pytest.mark.parametrize("step", [lora, frozen])
def test_leading_dimensions(direct, shape, step):
    layer = make_layer(12, 50, 41, 4)
    expected = step(layer)
    found = step(layer, layer.x.view(shape))
    assert len(direct) == 4
    assert found[0].shape == (*shape[:-1], 41)
    assert found[1].shape == shape
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(found, expected, strict=True))
    # An input whose rows do not lie one after another.
    gaps = torch.stack([layer.x, layer.x], dim=-1).view(*shape, 2)[..., 0]
    owner = Owner(layer.weight, None, layer.bias)
    assert torch.equal(FrozenLinear.apply(gaps, owner, F32), expected_frozen(layer).view(*shape[:-1], 41))


def expected_frozen(layer):
    return torch.ops.pyadapt.linear_forward(layer.x, layer.weight, None, layer.bias, F32)


def test_an_expanded_gradient(direct):
    layer = make_layer(12, 50, 41, 4)
    owner = Owner(layer.weight, None, layer.bias)
    x = layer.x.clone().requires_grad_()
    LoraLinear.apply(x, layer.A.requires_grad_(), layer.B.requires_grad_(), owner, 1.5, 0.0, None, F32).sum().backward()
    assert direct == ["lora_forward", "lora_backward"]
    ones = make_layer(12, 50, 41, 4)
    exact = type(ones)(**{**vars(layer), "g": torch.ones(12, 41)}).exact_backward()
    for found, value in zip((x.grad, layer.A.grad, layer.B.grad), exact, strict=True):
        assert_close(found, value, "product", F32)


def negative(tensor):
    """The same values, as memory that holds their negatives and a bit that says so."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


def test_a_lazily_negated_input_or_gradient():
    layer = make_layer(12, 1, 1, 1)
    expected = lora(layer)
    x, owner = negative(layer.x), Owner(layer.weight, None, layer.bias)
    assert x.is_neg()
    A, B = layer.A.clone().requires_grad_(), layer.B.clone().requires_grad_()
    assert torch.equal(LoraLinear.apply(x, A, B, owner, 1.5, 0.0, None, F32), expected[0])
    x = layer.x.clone().requires_grad_()
    y = LoraLinear.apply(x, A, B, owner, 1.5, 0.0, None, F32)
    assert same((y, *torch.autograd.grad(y, [x, A, B], negative(layer.g))), expected)
    y = FrozenLinear.apply(x, owner, F32)
    assert torch.equal(torch.autograd.grad(y, x, negative(layer.g))[0], frozen(layer)[1])


def test_a_fake_tensor_mode_sees_ops(direct):
    layer = make_layer(12, 50, 41, 4)
    with FakeTensorMode() as mode:
        fake = type(layer)(
            **{name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in vars(layer).items()}
        )
        found = lora(fake)
    # The fake tensors remember what they are without their mode, too.
    found += lora(fake)
    assert [tuple(t.shape) for t in found] == [(12, 41), (12, 50), (4, 50), (41, 4)] * 2
    assert direct == []


def test_make_fx_sees_ops(direct):
    layer = make_layer(12, 50, 41, 4)
    graph = make_fx(lambda x: lora(layer, x))(layer.x)
    called = [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("pyadapt.")]
    assert called == ["pyadapt.lora_forward.default", "pyadapt.lora_backward.default"]
    assert direct == []
    assert same(graph(layer.x), lora(layer))


def test_function_modes_see_ops(direct):
    class Names(TorchFunctionMode):
        names = ()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names += (str(function),)
            return function(*args, **(kwargs or {}))

    with Names() as mode:
        lora(make_layer(12, 50, 41, 4))
    assert any("lora_forward" in name for name in mode.names)
    assert direct == []


def test_a_default_device_does_not_reach_the_outputs():
    layer = make_layer(12, 50, 41, 4)
    expected = lora(layer)
    with torch.device("meta"):
        assert same(lora(layer), expected)


@pytest.mark.parametrize("pair", [False, True])
def test_tensors_of_another_class_see_ops(direct, pair):
    layer = make_layer(12, 50, 41, 4)

    class Named(torch.Tensor):
        pass

    owner = Owner(layer.weight, None, layer.bias)
    A, B = layer.A.requires_grad_(), layer.B.requires_grad_()
    x = TwoTensor(layer.x, layer.x) if pair else layer.x.as_subclass(Named)
    with Seen() as seen:
        y = LoraLinear.apply(x, A, B, owner, 1.5, 0.0, None, F32)
    direct.clear()
    if not pair:
        LoraLinear.apply(x, A, B, owner, 1.5, 0.0, None, F32)
    assert set(seen.ops) == {"pyadapt::lora_forward"}
    assert direct == []
    assert torch.equal(y.a if pair else y.as_subclass(torch.Tensor), lora(layer)[0])


def test_what_is_watched():
    x = torch.zeros(2, 3)
    assert not registry.watched(x, x)
    assert not registry.watched(nn.Parameter(x))
    seen = []
    torch.func.vmap(lambda x: seen.append(registry.watched(x)) or x)(x)
    torch.func.grad(lambda x: seen.append(registry.watched(x)) or x.sum())(x)
    torch.jit.trace(lambda x: seen.append(registry.watched(x)) or x + 1, x, check_trace=False)
    assert seen == [True] * 3
    leaked = []
    torch.func.grad(lambda x: leaked.append(x) or x.sum())(x)
    assert registry.watched(leaked[0])


def test_forcing_a_route_is_heard_at_once(direct):
    layer = make_layer(12, 50, 41, 4)
    lora(layer)
    assert len(direct) == 2
    with routes.forced("reference"), Seen() as seen:
        lora(layer)
    with routes.forced("reference"):
        lora(layer)
    assert len(direct) == 2
    assert seen.ops == LORA_OPS
    lora(layer)
    assert len(direct) == 4


def test_the_pairs_that_are_remembered_stay_few(monkeypatch):
    monkeypatch.setattr(routes, "_MOST_PAIRS", 3)
    weight = torch.zeros(6, 8)
    with routes.forced("fused"):
        for M in range(1, 9):
            assert routes.native_pair(torch.zeros(M, 8), weight, F32) == ("fused", "fused")
            assert len(routes._pairs) <= 3
    assert routes.native_pair(torch.zeros(4, 8), weight, F32) == ("skinny", "fused")
    assert routes.native_pair(torch.zeros(4, 8).double(), weight.double(), torch.float64) is None
    assert routes.native_pair(torch.zeros(4, 8, device="meta"), weight, F32) is None
