"""LoKr's forward and backward against fp64 mathematics, on every instruction set and route."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close, coarsest
from torch.autograd.graph import saved_tensors_hooks

from ops.oracle import Owner, make_layer
from pyadapt import native
from pyadapt.ops import lokr, routes
from pyadapt.ops.kernels import cpu
from pyadapt.ops.lokr import LokrLinear

F64, F32, BF16, F16, I8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8

# M, a, b, c, d, and the rank of w2; 0: w2 is full. Vectors of 4 to 16 and tiles of 6 and 8 rows have tails here.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 1, 127, 1, 33, 5),
    (5, 2, 3, 4, 5, 0),
    (37, 5, 7, 3, 19, 4),
    (33, 9, 17, 1, 40, 0),
    (130, 16, 32, 16, 32, 8),
    (70, 13, 33, 14, 31, 17),
    (600, 3, 11, 2, 20, 2),
]
SCALING = 1.5


class Case:
    """A frozen layer and a LoKr term, with every result in fp64."""

    def __init__(self, shape, dtype=F32, weight_dtype=None, *, dropped=False, adapter_dtype=None, transposed=False):
        torch.manual_seed(1)
        M, a, b, c, d, r = shape
        adapter_dtype = adapter_dtype or (F64 if dtype == F64 else F32)
        frozen = make_layer(M, c * d, a * b, 0, dtype, weight_dtype, transposed=transposed)
        self.x, self.g, self.owner = frozen.x, frozen.g, Owner(frozen.weight, frozen.weight_scale, frozen.bias)
        shapes = [(a, c), (r, d), (b, r)] if r else [(a, c), (b, d)]
        self.matrices = [torch.randn(size).to(adapter_dtype).requires_grad_() for size in shapes]
        self.factors = (torch.arange(a * b) % 3 > 0).float() * 1.5 if dropped else None
        self.frozen, self.frozen_dx = frozen.exact_frozen()
        if frozen.bias is not None:
            self.frozen = self.frozen + frozen.bias.double()
        self.exact()

    def exact(self):
        """By autograd from the definition, with the product formed."""
        x = self.x.detach().double().requires_grad_()
        exact = [matrix.detach().double().requires_grad_() for matrix in self.matrices]
        w1, down, *up = exact
        delta = SCALING * torch.kron(w1, up[0] @ down if up else down)
        if self.factors is not None:
            delta = delta * self.factors.double()[:, None]
        term = x @ delta.t()
        self.y = (self.frozen + term).detach()
        dx, *self.gradients = torch.autograd.grad(term, [x, *exact], self.g.double())
        self.dx = self.frozen_dx + dx

    def run(self, x, out_dtype=None):
        w1, down, *up = self.matrices
        up = up[0] if up else None
        return LokrLinear.apply(x, w1, down, up, self.factors, self.owner, SCALING, out_dtype or x.dtype)

    def check(self, out_dtype=None):
        for matrix in self.matrices:
            matrix.grad = None
        x = self.x.clone().requires_grad_()
        y = self.run(x, out_dtype)
        inputs = coarsest(x.dtype, y.dtype)
        assert y.dtype == (out_dtype or x.dtype)
        assert_close(y, self.y, "product", inputs, "y", part=self.frozen)
        y.backward(self.g.to(y.dtype))
        assert x.grad.dtype == x.dtype
        assert_close(x.grad, self.dx, "product", inputs, "dx", part=self.frozen_dx)
        wide = F64 if x.dtype == F64 else F32
        for matrix, exact, name in zip(self.matrices, self.gradients, ("w1", "down", "up"), strict=False):
            assert matrix.grad.dtype == matrix.dtype
            assert_close(matrix.grad, exact, "product", coarsest(wide, matrix.dtype), f"gradient of {name}")


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
@pytest.mark.parametrize("weight_dtype", [F32, BF16, I8], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(isa, shape, dtype, weight_dtype, dropped):
    Case(shape, dtype, weight_dtype, dropped=dropped).check()


@pytest.mark.parametrize("route", routes.FORCIBLE)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(37, 5, 7, 3, 19, 4), (33, 9, 17, 1, 40, 0)], ids=str)
def test_every_route(route, dtype, shape):
    with routes.forced(route):
        Case(shape, dtype, dropped=True).check()
        Case(shape, dtype, I8).check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp64(shape):
    Case(shape, F64, dropped=True).check()


@pytest.mark.parametrize("M", [0, 1, 65])
@pytest.mark.parametrize("r", [0, 2])
def test_empty_and_small_batches(isa, M, r):
    Case((M, 3, 5, 4, 6, r)).check()


@pytest.mark.parametrize("adapter_dtype", [BF16, F16], ids=str)
def test_adapters_in_16_bits(isa, adapter_dtype):
    Case((34, 4, 9, 5, 11, 3), BF16, adapter_dtype=adapter_dtype).check()


def test_output_of_another_dtype(isa):
    """As under autocast: x in fp32, y and g in bf16."""
    case = Case((34, 4, 9, 5, 11, 3), F32)
    case.g = case.g.to(BF16).float()
    case.frozen_dx = case.g.double() @ case.owner.weight.double()
    case.exact()
    case.check(BF16)


def test_weight_stored_transposed(isa):
    Case((35, 4, 9, 5, 11, 3), BF16, transposed=True).check()


@pytest.mark.parametrize("leading", [(), (5, 7)], ids=["one token", "three dimensions"])
def test_leading_dimensions(isa, leading):
    rows = torch.Size(leading).numel()
    case = Case((rows, 4, 9, 5, 11, 3), BF16)
    flat = case.run(case.x)
    y = case.run(case.x.view(*leading, 55))
    assert y.shape == (*leading, 36)
    assert torch.equal(y.view(rows, 36), flat)


def test_any_stride_of_x_and_g(isa):
    case = Case((40, 4, 9, 5, 11, 3))
    wide = torch.randn(40, 60)
    for x in (wide[:, 2:57], torch.randn(55, 40).t()):
        case.x = x
        case.frozen = x.double() @ case.owner.weight.double().t() + case.owner.bias.double()
        case.g = torch.tensor(0.5).expand(40, 36)
        case.frozen_dx = case.g.double() @ case.owner.weight.double()
        case.exact()
        case.check()


def test_leading_dimensions_that_are_swapped(isa):
    """The rows of x and g have no common stride then."""
    case = Case((35, 4, 9, 5, 11, 3))
    x, g = case.x.view(5, 7, 55).transpose(0, 1), case.g.view(5, 7, 36).transpose(0, 1)
    plain, x = case.x.clone().requires_grad_(), x.requires_grad_()
    expected = case.run(plain)
    expected.backward(case.g)
    wanted = [matrix.grad.clone() for matrix in case.matrices]
    for matrix in case.matrices:
        matrix.grad = None
    y = case.run(x)
    y.backward(g)
    assert_close(y.transpose(0, 1).reshape(35, 36), expected.double(), "product", F32)
    assert_close(x.grad.transpose(0, 1).reshape(35, 55), plain.grad.double(), "product", F32)
    for matrix, gradient in zip(case.matrices, wanted, strict=True):
        assert_close(matrix.grad, gradient.double(), "product", F32)


@pytest.mark.parametrize("r", [0, 8])
def test_any_number_of_threads_gives_the_same_bits(isa, r):
    case = Case((300, 16, 32, 16, 32, r), BF16)
    x, (w1, down, *up) = case.x, [matrix.detach() for matrix in case.matrices]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, dx = torch.zeros_like(case.g), torch.zeros_like(x)
        arguments = w1, down, up[0] if up else None, None, SCALING
        cpu.lokr_forward_(y, x, *arguments)
        found.append([y, dx, *cpu.lokr_backward_(dx, case.g, x, *arguments)])
    for others in found[1:]:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("r", [0, 3])
def test_the_term_alone(isa, r):
    """Without an owner, beside the output of other adapters."""
    case = Case((34, 4, 9, 5, 11, r))
    case.owner = None
    case.frozen, case.frozen_dx = torch.zeros(34, 36).double(), torch.zeros(34, 55).double()
    case.exact()
    case.check()


def test_an_x_that_needs_no_gradient(isa):
    case = Case((34, 4, 9, 5, 11, 3))
    case.run(case.x).backward(case.g)
    assert case.owner.asked == 2
    for matrix, exact in zip(case.matrices, case.gradients, strict=True):
        assert_close(matrix.grad, exact, "product", F32)


@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_x_and_the_factors_are_all_that_is_kept(isa, dtype, r):
    """Neither U nor V, nor anything else that grows with M."""
    case, kept = Case((64, 4, 9, 5, 11, r), dtype), []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = case.x.requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run(x)
    known = {tensor.data_ptr() for tensor in (x, *case.matrices)}
    assert {tensor.data_ptr() for tensor in kept} == known


def test_nan_and_inf_propagate(isa):
    case = Case((34, 4, 9, 5, 11, 3))
    case.x[2, 5], case.x[1, 7] = float("nan"), float("inf")
    y = case.run(case.x)
    assert not y[1:3].isfinite().any()
    assert y[0].isfinite().all()
    assert y[3:].isfinite().all()


def test_a_large_right_factor_is_left_to_torch(monkeypatch):
    case = Case((34, 4, 9, 5, 11, 0))
    asked = []
    monkeypatch.setattr(cpu, "lokr_forward_", lambda y, *rest: asked.append(1) or y)
    case.run(case.x)
    assert asked == [1] * native.available()
    monkeypatch.setattr(lokr, "LARGEST_FACTOR", 9 * 11 - 1)
    case.check()
    assert asked == [1] * native.available()


@pytest.mark.parametrize("r", [0, 3])
def test_ops_pass_opcheck(r):
    case = Case((12, 4, 9, 5, 11, r), F32)
    w1, down, *up = (matrix.detach() for matrix in case.matrices)
    up = up[0] if up else None
    weight, _, bias = case.owner.operands()
    forward, backward = torch.ops.pyadapt.lokr_forward, torch.ops.pyadapt.lokr_backward
    tests = ("test_schema", "test_faketensor")
    for of in (weight, None):
        for factors in (None, torch.rand(36)):
            arguments = case.x, of, None, bias, w1, down, up, factors, 1.5, F32
            torch.library.opcheck(forward, arguments, test_utils=tests)
            arguments = case.g, case.x, of, None, w1, down, up, factors, 1.5, True
            torch.library.opcheck(backward, arguments, test_utils=tests)
            torch.library.opcheck(backward, (*arguments[:-1], False), test_utils=tests)


def test_double_backward_is_refused():
    case = Case((12, 4, 9, 5, 11, 3))
    x = case.x.requires_grad_()
    (dx,) = torch.autograd.grad(case.run(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(4, 19)}, r"x has shape \(4, 19\); wanted \(M, c d\) = \(4, 20\)"),
        ({"y": torch.zeros(4, 5)}, r"y has shape \(4, 5\); wanted \(M, a b\) = \(4, 6\)"),
        ({"down": torch.zeros(2, 5, dtype=F64)}, "down"),
        ({"w1": torch.zeros(2, 4, dtype=BF16)}, "w1 is bfloat16; wanted float32"),
        ({"up": torch.zeros(3, 7)}, r"up has shape \(3, 7\); wanted \(b, h\) = \(3, 2\)"),
        ({"factors": torch.zeros(7)}, r"factors has shape \(7,\); wanted \(a b,\) = \(6,\)"),
        ({"w1": torch.zeros(2, 8)[:, :4]}, "w1 has gaps between its rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_kernel_refuses_what_does_not_fit(needs_native, change, said):
    operands = {
        "y": torch.zeros(4, 6),
        "x": torch.zeros(4, 20),
        "w1": torch.zeros(2, 4),
        "down": torch.zeros(2, 5),
        "up": torch.zeros(3, 2),
        "factors": None,
        **change,
    }
    with pytest.raises((TypeError, ValueError), match=said):
        cpu.lokr_forward_(**operands, scaling=1.0)
