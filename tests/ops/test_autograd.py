"""The autograd Functions: gradients, what they save, and how they behave in a module."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close
from torch import nn

from ops.oracle import Owner, make_layer
from pyadapt.ops.linear import FrozenLinear
from pyadapt.ops.lora import LoraLinear


def apply(layer, x, A, B, owner=None):
    owner = owner or Owner(layer.weight, layer.weight_scale, layer.bias)
    return LoraLinear.apply(x, A, B, owner, layer.scaling, layer.dropout_p, layer.seed, x.dtype)


def leaves(layer):
    return [tensor.clone().requires_grad_() for tensor in (layer.x, layer.A, layer.B)]


def test_gradients(isa):
    layer = make_layer(34, 50, 41, 4).with_dropout(0.2)
    x, A, B = leaves(layer)
    apply(layer, x, A, B).backward(layer.g)
    for leaf, exact in zip((x, A, B), layer.exact_backward(), strict=True):
        assert_close(leaf.grad, exact, "product", torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    layer = make_layer(3, 5, 4, 2, torch.float64, adapter_dtype=torch.float64).with_dropout(p)
    assert torch.autograd.gradcheck(lambda x, A, B: apply(layer, x, A, B), leaves(layer))
    owner = Owner(layer.weight, None, layer.bias)
    x = layer.x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: FrozenLinear.apply(x, owner, torch.float64), x)


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = function()
    return result, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saves_x_adapters_S_and_the_seed(dtype):
    layer = make_layer(12, 50, 41, 4, dtype).with_dropout(0.2)
    x, A, B = leaves(layer)
    _, saved = saved_by(lambda: apply(layer, x, A, B))
    S_bytes, seed_bytes = 12 * 4 * 4, 8
    own = [tensor for tensor in saved if tensor.data_ptr() not in {t.data_ptr() for t in (x, A, B)}]
    assert sum(t.nbytes for t in own) == S_bytes + seed_bytes
    assert sum(t.nbytes for t in saved) == x.nbytes + A.nbytes + B.nbytes + S_bytes + seed_bytes


def test_saves_x_itself_where_its_rows_are_copied():
    layer = make_layer(12, 50, 41, 4)
    x = layer.x.view(3, 4, 50).transpose(0, 1).requires_grad_()
    _, saved = saved_by(lambda: apply(layer, x, layer.A.requires_grad_(), layer.B.requires_grad_()))
    assert any(t.data_ptr() == x.data_ptr() and t.shape == x.shape for t in saved)


def test_the_frozen_layer_saves_nothing():
    layer = make_layer(12, 50, 41, 4)
    owner = Owner(layer.weight, None, layer.bias)
    x = layer.x.clone().requires_grad_()
    y, saved = saved_by(lambda: FrozenLinear.apply(x, owner, torch.float32))
    assert saved == []
    y.backward(layer.g)
    assert_close(x.grad, layer.g.double() @ layer.exact_weight(), "product", torch.float32)


def test_the_weight_is_asked_for_again_in_backward():
    layer = make_layer(12, 50, 41, 4)
    owner = Owner(layer.weight, None, layer.bias)
    x, A, B = leaves(layer)
    y = apply(layer, x, A, B, owner)
    assert owner.asked == 1
    # As under ZeRO-3: the weight is another tensor by the time of the backward.
    owner.weight = layer.weight.clone()
    y.backward(layer.g)
    assert owner.asked == 2
    assert_close(x.grad, layer.exact_backward()[0], "product", torch.float32)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_leading_dimensions(shape):
    layer = make_layer(6, 10, 12, 3)
    x = torch.randn(*shape, 10, requires_grad=True)
    y = apply(layer, x, layer.A.requires_grad_(), layer.B.requires_grad_())
    assert y.shape == (*shape, 12)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.A.grad.shape == layer.A.shape


def test_input_without_gradient():
    layer = make_layer(6, 10, 12, 3)
    A, B = layer.A.requires_grad_(), layer.B.requires_grad_()
    apply(layer, layer.x, A, B).backward(layer.g)
    _, dA, dB = layer.exact_backward()
    assert_close(A.grad, dA, "product", torch.float32)
    assert_close(B.grad, dB, "product", torch.float32)


def test_double_backward_says_that_it_does_not_work():
    layer = make_layer(6, 10, 12, 3)
    x, A, B = leaves(layer)
    (dx,) = torch.autograd.grad(apply(layer, x, A, B).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_autocast_does_not_reach_into_the_op():
    layer = make_layer(40, 10, 12, 3)
    x, A, B = leaves(layer)
    plain = apply(layer, x, A, B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = apply(layer, x, A, B)
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_mask(reentrant):
    layer = make_layer(12, 50, 41, 4).with_dropout(0.3)
    x, A, B = leaves(layer)
    run = lambda x: apply(layer, x, A, B)  # noqa: E731
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant).backward(layer.g)
    assert_close(x.grad, layer.exact_backward()[0], "product", torch.float32)


class Adapted(nn.Linear):
    """A toy layer in the shape of the library's own: unit called with the layer, weight read from it."""

    class Unit(nn.Module):
        def __init__(self, K, N):
            super().__init__()
            self.A, self.B = nn.Parameter(torch.randn(3, K)), nn.Parameter(torch.randn(N, 3))

        def forward(self, x, owner, seed):
            return LoraLinear.apply(x, self.A, self.B, owner, 2.0, 0.25, seed, x.dtype)

    def __init__(self, K, N):
        super().__init__(K, N)
        self.requires_grad_(False)
        self.unit = self.Unit(K, N)

    def operands(self):
        return self.weight, None, self.bias

    def forward(self, x):
        return self.unit(x, self, torch.full((1,), 77))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    model = nn.Sequential(Adapted(10, 12), nn.ReLU(), Adapted(12, 7))
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(2, 5, 10, requires_grad=True)

    def gradients(run):
        return torch.autograd.grad(run(x).square().sum(), [x, *trained])

    eager = gradients(model)
    for value, exact in zip(gradients(torch.compile(model, fullgraph=True, backend=backend)), eager, strict=True):
        assert_close(value, exact, "product", torch.float32)
