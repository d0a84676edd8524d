"""A batch whose segments of rows have adapters of their own, against fp64 mathematics and the one-adapter op."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerance import assert_close, coarsest
from torch import Tensor, nn

from ops.oracle import Owner
from ops.rows_oracle import PATTERNS, RANKS, Batch, make_batch, segments_of
from pyadapt.ops import lora_rows, routes
from pyadapt.ops.lora import LoraLinear
from pyadapt.ops.lora_rows import LoraRows

F32, BF16, F16, I8, F64 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64


def check(batch: Batch, need_dx: bool = True) -> None:
    """Every result of a batch against the oracle."""
    inputs = coarsest(batch.x.dtype, batch.g.dtype)
    summed = F64 if batch.x.dtype == F64 else F32
    y, S = batch.forward()
    exact_y, exact_S = batch.exact_forward()
    assert (y.dtype, S.dtype) == (batch.x.dtype, summed)
    assert_close(S, exact_S, "product", summed, "S")
    assert_close(y, exact_y, "product", inputs, "y", part=batch.x.double() @ batch.exact_weight().t())
    dx, dAs, dBs = batch.backward(S, need_dx)
    exact_dx, exact_dAs, exact_dBs = batch.exact_backward()
    for a, (A, dA, dB) in enumerate(zip(batch.As, dAs, dBs, strict=True)):
        assert dA.dtype == dB.dtype == A.dtype
        assert_close(dA, exact_dAs[a], "product", coarsest(summed, A.dtype), f"dA[{a}]")
        assert_close(dB, exact_dBs[a], "product", coarsest(summed, A.dtype), f"dB[{a}]")
        if not batch.rows_of(a).any():
            assert not dA.any()
            assert not dB.any()
    if need_dx:
        assert dx.dtype == batch.x.dtype
        assert_close(dx, exact_dx, "product", inputs, "dx", part=batch.g.double() @ batch.exact_weight())
    else:
        assert dx.numel() == 0


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_values(isa, dtype, pattern):
    check(make_batch(pattern, dtype=dtype))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_dropout(isa, pattern):
    check(make_batch(pattern, dropouts=(0.3, 0.0, 1.0, 0.05)))
    check(make_batch(pattern, K=530, dtype=BF16, dropouts=(0.3, 0.5)))


@pytest.mark.parametrize("K_N", [(1, 1), (7, 9), (64, 96), (515, 31), (33, 1100)], ids=str)
@pytest.mark.parametrize("weight_dtype", [BF16, I8], ids=str)
def test_shapes(isa, weight_dtype, K_N):
    for name in ("few and many rows", "an adapter in several segments"):
        check(make_batch(PATTERNS[name], *K_N, BF16, weight_dtype))


def test_long_segments_and_large_ranks(isa):
    check(make_batch([(300, 0), (1, 1), (260, 1), (2, 0)], ranks=(70, 33)))


def test_adapters_in_several_dtypes(isa):
    for pattern in ("a row each", "few and many rows"):
        check(make_batch(PATTERNS[pattern], dtype=BF16, adapter_dtypes=(BF16, F32, F16)))


@pytest.mark.parametrize("rank", [0, 4])
def test_no_rank(isa, rank):
    batch = make_batch([(2, 0), (9, 1)], ranks=(0, rank))
    check(batch)
    frozen = torch.ops.pyadapt.linear_forward(batch.x, batch.weight, None, batch.bias, F32)
    assert torch.equal(batch.forward()[0][:2], frozen[:2])


def test_base_rows_are_the_frozen_layer_bit_by_bit(isa):
    batch = make_batch(PATTERNS["base rows between"], dtype=BF16)
    base = batch.rows_of(-1)
    frozen = torch.ops.pyadapt.linear_forward(batch.x, batch.weight, None, batch.bias, BF16)
    y, S = batch.forward()
    assert torch.equal(y[base], frozen[base])
    assert not S[base].any()
    dx, _, _ = batch.backward(S)
    assert torch.equal(dx[base], torch.ops.pyadapt.linear_dx(batch.g, batch.weight, None, BF16)[base])


@pytest.mark.parametrize("rows", [3, 40])
def test_same_mask_as_the_one_adapter_op(isa, rows):
    """A weight of zeros leaves the mask alone: S and mask(dS A) of both ops drop the same elements of the same rows."""
    K, p = 66, 0.4
    batch = make_batch([(2, -1), (rows, 0), (1, 1)], K=K, dropouts=(p,), ranks=(K, K))
    batch = replace(batch, weight=torch.zeros_like(batch.weight), As=[torch.eye(K)] * 2)
    _, S = batch.forward()
    _, one_S = torch.ops.pyadapt.lora_forward(
        batch.x, batch.weight, None, None, batch.As[0], batch.Bs[0], 1.0, p, batch.seed, F32
    )
    served = ~batch.rows_of(-1)
    assert torch.equal(S[served] == 0, one_S[served] == 0)
    dx, _, _ = batch.backward(S)
    assert torch.equal(dx[served] == 0, one_S[served] == 0)


def test_output_dtype_is_free(isa):
    # Fewer rows than the library route takes: that one rounds to bf16 on the way.
    batch = make_batch([(3, 0), (40, 1), (1, 3)], dtype=BF16)
    for out_dtype in (F32, F16):
        y, _ = batch.forward(out_dtype)
        assert y.dtype == out_dtype
        assert_close(y, batch.exact_forward()[0], "product", out_dtype)
        check(replace(batch, g=batch.g.to(out_dtype)))


def test_without_dx(isa):
    check(make_batch(PATTERNS["few and many rows"]), need_dx=False)


def test_any_stride_of_the_inputs(isa):
    batch = make_batch(PATTERNS["few and many rows"])

    def turned(tensor):
        return tensor.t().contiguous().t()

    check(replace(batch, x=turned(batch.x), g=turned(batch.g)))
    check(replace(batch, As=[turned(A) for A in batch.As], Bs=[turned(B) for B in batch.Bs]))
    check(replace(batch, g=torch.tensor(0.5).expand(batch.g.shape)))
    check(replace(batch, x=torch.randn(80, 90)[:, 7:82], segments=batch.segments.t().contiguous().t()))


@pytest.mark.parametrize("pattern", ["a row each", "few and many rows", "an adapter in several segments"])
def test_same_bits_every_time_and_for_any_number_of_threads(isa, pattern):
    batch = make_batch(PATTERNS[pattern], K=700, N=1300, dtype=BF16, dropouts=(0.1,))
    results = []
    for threads in (1, 1, 2, 5):
        torch.set_num_threads(threads)
        y, S = batch.forward()
        dx, dAs, dBs = batch.backward(S)
        results.append((y, S, dx, *dAs, *dBs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("route", ["library", "reference"])
@pytest.mark.parametrize("weight_dtype", [BF16, I8], ids=str)
def test_routes(isa, route, weight_dtype):
    with routes.forced(route):
        check(make_batch(PATTERNS["few and many rows"], 70, 45, BF16, weight_dtype, dropouts=(0.3, 0.0)))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_plain_torch(monkeypatch, pattern):
    """Where no native kernels are, and in fp64."""
    monkeypatch.setattr(lora_rows, "_native_serves", lambda *given: False)
    check(make_batch(pattern, dropouts=(0.3, 0.0)))
    check(make_batch(pattern, dtype=F64, adapter_dtypes=(F64,), dropouts=(0.3, 0.0)))


def test_references_have_the_op_signatures():
    batch = make_batch(PATTERNS["few and many rows"], dropouts=(0.5,))
    y, S = lora_rows.lora_rows_forward_reference(*batch.forward_arguments(F32))
    own_y, own_S = batch.forward()
    assert_close(own_y, y.double(), "product", F32)
    assert_close(own_S, S.double(), "product", F32)
    dx, dAs, dBs = lora_rows.lora_rows_backward_reference(*batch.backward_arguments(S, True))
    own_dx, own_dAs, own_dBs = batch.backward(S)
    for own, value in zip((own_dx, *own_dAs, *own_dBs), (dx, *dAs, *dBs), strict=True):
        assert_close(own, value.double(), "product", F32)


@pytest.mark.parametrize("route", ["fused", "library", "reference"])
@pytest.mark.parametrize("weight_dtype", [F32, I8], ids=str)
def test_opcheck(route, weight_dtype):
    batch = make_batch(PATTERNS["few and many rows"], 10, 12, F32, weight_dtype, dropouts=(0.25,))
    with routes.forced(route):
        torch.library.opcheck(torch.ops.pyadapt.lora_rows_forward.default, batch.forward_arguments(BF16))
        _, S = batch.forward()
        for need_dx in (True, False):
            torch.library.opcheck(torch.ops.pyadapt.lora_rows_backward.default, batch.backward_arguments(S, need_dx))


# --- the autograd Function ---


def apply(batch: Batch, x: Tensor, *matrices: Tensor, owner: Owner | None = None) -> Tensor:
    owner = owner or Owner(batch.weight, batch.weight_scale, batch.bias)
    return LoraRows.apply(x, owner, batch.segments, batch.scalings, batch.dropouts, batch.seed, x.dtype, *matrices)


def leaves(batch: Batch) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in (batch.x, *batch.As, *batch.Bs)]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    pattern = [(1, 1), (2, -1), (1, 0), (1, 1)]
    batch = make_batch(pattern, 5, 4, F64, adapter_dtypes=(F64,), dropouts=(p,), ranks=(2, 1))
    assert torch.autograd.gradcheck(lambda x, *matrices: apply(batch, x, *matrices), leaves(batch))


def test_gradients(isa):
    batch = make_batch(PATTERNS["few and many rows"], dropouts=(0.2,))
    given = leaves(batch)
    apply(batch, *given).backward(batch.g)
    dx, dAs, dBs = batch.exact_backward()
    for leaf, exact in zip(given, (dx, *dAs, *dBs), strict=True):
        assert_close(leaf.grad, exact, "product", F32)


def test_one_adapter_is_the_one_adapter_layer():
    batch = make_batch([(40, 0)], dropouts=(0.2,), ranks=(8,))
    given = leaves(batch)
    apply(batch, *given).backward(batch.g)
    single = leaves(batch)
    owner = Owner(batch.weight, None, batch.bias)
    LoraLinear.apply(*single, owner, batch.scalings[0], 0.2, batch.seed, F32).backward(batch.g)
    for value, exact in zip(given, single, strict=True):
        assert_close(value.grad, exact.grad, "product", F32)


def test_the_weight_is_asked_for_again_in_backward_and_never_saved():
    batch = make_batch(PATTERNS["few and many rows"])
    owner, saved, given = Owner(batch.weight, None, batch.bias), [], leaves(batch)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = apply(batch, *given, owner=owner)
    assert owner.asked == 1
    S_bytes = 4 * batch.x.shape[0] * max(RANKS)
    assert sum(t.nbytes for t in saved) == S_bytes + sum(t.nbytes for t in (*given, batch.seed, batch.segments))
    owner.weight = batch.weight.clone()  # as under ZeRO-3: another tensor by the time of the backward
    y.backward(batch.g)
    assert owner.asked == 2
    assert_close(given[0].grad, batch.exact_backward()[0], "product", F32)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 0)], ids=str)
def test_leading_dimensions(shape):
    batch = make_batch([(1, 0), (5, 1)])
    if 0 in shape:
        batch = replace(batch, segments=batch.segments[:0])
    x = torch.randn(*shape, batch.x.shape[1], requires_grad=True)
    y = apply(batch, x, *batch.As, *batch.Bs)
    assert y.shape == (*shape, batch.weight.shape[0])
    y.sum().backward()
    assert x.grad.shape == x.shape


class Adapted(nn.Linear):
    """A toy layer in the shape of the library's own."""

    def __init__(self, K, N):
        super().__init__(K, N)
        self.requires_grad_(False)
        self.As = nn.ParameterList([torch.randn(r, K) for r in (3, 2)])
        self.Bs = nn.ParameterList([torch.randn(N, r) for r in (3, 2)])

    def operands(self):
        return self.weight, None, self.bias

    def forward(self, x, segments):
        return LoraRows.apply(
            x, self, segments, [2.0, 0.5], [0.25, 0.0], torch.full((1,), 77), x.dtype, *self.As, *self.Bs
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_a_new_assignment_does_not_recompile(backend):
    layer = Adapted(10, 12)
    trained = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(6, 10, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)

    def gradients(run, segments):
        return torch.autograd.grad(run(x, segments).square().sum(), [x, *trained])

    for pattern in ([(2, 0), (4, 1)], [(1, 1), (5, -1)]):
        segments = segments_of(pattern)
        with torch._dynamo.config.patch(error_on_recompile=True):
            values = gradients(compiled, segments)
        for value, exact in zip(values, gradients(layer, segments), strict=True):
            assert_close(value, exact, "product", F32)


# --- what it says to bad input ---

BAD_SEGMENTS = {
    "beyond the rows": ([[0, 0], [9, 1]], r"segments\[1\] starts at row 9, but x has 6"),
    "not from the first row": ([[1, 0]], r"segments starts at row 1; wanted 0"),
    "not ascending": ([[0, 0], [4, 1], [2, 0]], r"segments\[2\] starts at row 2, before segments\[1\] at 4"),
    "negative row": ([[0, 0], [-1, 1]], r"segments\[1\] starts at row -1, before"),
    "adapter too high": ([[0, 0], [2, 4]], r"segments\[1\] asks for adapter 4 of 4"),
    "adapter too low": ([[0, -2]], r"segments\[0\] asks for adapter -2 of 4"),
    "none": (torch.zeros(0, 2, dtype=torch.int64), r"segments is empty, but x has 6 rows"),
    "three columns": ([[0, 0, 0]], r"segments has shape \(1, 3\)"),
    "a flat list": ([0, 0], r"segments has shape \(2,\)"),
    "not integers": ([[0.0, 0.0]], r"segments is (torch\.)?float32"),
}


@pytest.fixture(params=["native", "plain torch"])
def implementation(request, monkeypatch):
    """Both forms of the op must say it."""
    if request.param == "plain torch":
        monkeypatch.setattr(lora_rows, "_native_serves", lambda *given: False)
    else:
        request.getfixturevalue("needs_native")


@pytest.mark.parametrize(("table", "message"), BAD_SEGMENTS.values(), ids=BAD_SEGMENTS)
def test_bad_segments(implementation, table, message):
    batch = make_batch([(6, 0)])
    bad = replace(batch, segments=torch.as_tensor(table))
    with pytest.raises((ValueError, TypeError), match=message):
        bad.forward()
    with pytest.raises((ValueError, TypeError), match=message):
        bad.backward(batch.forward()[1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("As", [torch.randn(r, 74) for r in RANKS], r"A\[0\] has shape \(3, 74\); wanted \(r, K\)"),
        ("Bs", [torch.randn(53, r + (r == 16)) for r in RANKS], r"B\[1\] has shape \(53, 17\); wanted \(N, r\)"),
        ("Bs", [torch.randn(53, 3)], r"B has 1 entries; wanted one for each of the 4 adapters"),
        ("scalings", [1.0], r"scalings has 1 entries; wanted one for each of the 4 adapters"),
        ("dropouts", [0.0] * 5, r"dropouts has 5 entries; wanted one for each of the 4 adapters"),
        ("dropouts", [1.5] * 4, r"dropout_p is 1\.5\d*; it must lie in \[0, 1\]"),
    ],
)
def test_bad_adapters(implementation, name, value, message):
    batch = make_batch([(6, 0)])
    bad = replace(batch, **{name: value})
    with pytest.raises(ValueError, match=message):
        bad.forward()
    with pytest.raises(ValueError, match=message):
        bad.backward(batch.forward()[1])


def test_dropout_without_a_seed(implementation):
    batch = replace(make_batch([(6, 0)], dropouts=(0.5,)), seed=None)
    with pytest.raises(ValueError, match=r"no seed was given"):
        batch.forward()


@pytest.mark.usefixtures("needs_native")
def test_a_wrong_S_is_refused_before_it_is_read():
    batch = make_batch([(6, 0)])
    with pytest.raises(ValueError, match=r"S has shape \(6, 15\); wanted \(M, R\) = \(6, 16\)"):
        batch.backward(torch.zeros(6, 15))


# --- the benchmark ---

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="waits for a source tree: benchmarks are not installed")
def test_the_benchmark_runs_and_writes_its_rows(tmp_path):
    table = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmarks.rows", "--quick", "--csv", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["base"] for row in rows} == {"bf16", "fp32", "int8"}
    assert {"frozen", "one adapter", "16 adapters", "16 adapters, a slice each"} <= {row["case"] for row in rows}
    assert all(float(row["median_ms"]) > 0 and row["cpu"] for row in rows)
