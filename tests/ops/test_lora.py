"""LoRA's forward and backward against fp64 mathematics, on every instruction set and route."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolerance import assert_close, coarsest

from ops.oracle import Layer, make_layer
from pyadapt import native
from pyadapt.ops import lora, routes

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8

# Ragged on purpose: tiles of 4 to 32, blocks of 256 and 512, quads and pairs all have tails here.
SHAPES = [
    (1, 1, 1, 1),
    (1, 33, 17, 3),
    (4, 7, 9, 16),
    (33, 100, 65, 16),
    (35, 64, 96, 65),
    (70, 515, 31, 4),
    (130, 258, 77, 3),
    (600, 40, 530, 1),
]


def check(layer: Layer, need_dx: bool = True) -> None:
    """Every result of a layer against the oracle."""
    inputs = coarsest(layer.x.dtype, layer.g.dtype)
    # On a CPU the low-rank products over a bf16 x are products of bf16 matrices, summed in fp32.
    bf16 = inputs == BF16 and native.device_kind(layer.x) == "cpu"
    sums = BF16 if bf16 else F32
    y, S = layer.forward()
    exact_y, exact_S = layer.exact_forward()
    frozen_y, frozen_dx = layer.exact_frozen()
    assert y.dtype == layer.x.dtype
    assert S.dtype == F32
    assert_close(S, exact_S, "product", sums, "S")
    assert_close(y, exact_y, "product", inputs, "y", part=frozen_y)
    dx, dA, dB = layer.backward(S, need_dx)
    exact_dx, exact_dA, exact_dB = layer.exact_backward()
    assert dA.dtype == layer.A.dtype
    assert_close(dA, exact_dA, "product", coarsest(sums, dA.dtype), "dA")
    assert_close(dB, exact_dB, "product", coarsest(sums, dB.dtype), "dB")
    if need_dx:
        assert dx.dtype == layer.x.dtype
        assert_close(dx, exact_dx, "product", inputs, "dx", part=frozen_dx)
    else:
        assert dx.numel() == 0


@pytest.mark.parametrize("M_K_N_r", SHAPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [F32, BF16, F16, I8], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_values(isa, dtype, weight_dtype, M_K_N_r):
    check(make_layer(*M_K_N_r, dtype, weight_dtype))


@pytest.mark.parametrize("weight_dtype", [F32, BF16, F16, I8], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_weight_stored_transposed(isa, dtype, weight_dtype):
    check(make_layer(35, 70, 53, 5, dtype, weight_dtype, transposed=True))
    check(make_layer(2, 70, 53, 5, dtype, weight_dtype, transposed=True))


@pytest.mark.parametrize("adapter_dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_adapters_in_16_bits(isa, dtype, adapter_dtype):
    check(make_layer(34, 50, 41, 16, dtype, BF16, adapter_dtype))


@pytest.mark.parametrize("out_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("M", [3, 40])
def test_output_dtype_is_free(isa, out_dtype, M):
    layer = make_layer(M, 50, 41, 4, BF16)
    y, _ = layer.forward(out_dtype)
    assert y.dtype == out_dtype
    assert_close(y, layer.exact_forward()[0], "product", out_dtype)
    check(replace(layer, g=layer.g.to(out_dtype)))


@pytest.mark.parametrize("M", [3, 40])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_dropout(isa, dtype, p, M):
    check(make_layer(M, 530, 41, 4, dtype).with_dropout(p))
    check(make_layer(M, 37, 41, 4, dtype, I8).with_dropout(p))


def test_without_dx(isa):
    check(make_layer(40, 50, 41, 4), need_dx=False)


@pytest.mark.parametrize("M", [0, 1, 33])
def test_empty_and_small_batches(isa, M):
    check(make_layer(M, 20, 30, 4))


def test_no_rank_is_the_frozen_layer(isa):
    layer = make_layer(40, 50, 41, 0)
    frozen = torch.ops.pyadapt.linear_forward(layer.x, layer.weight, None, layer.bias, F32)
    assert torch.equal(layer.forward()[0], frozen)


def test_no_bias(isa):
    check(make_layer(40, 50, 41, 4, bias=False))


def strided(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    """The same values with ``gap`` elements between rows, at an address aligned to the element alone."""
    rows, cols = tensor.shape
    memory = tensor.new_full((rows * (cols + gap) + 1,), 77)
    view = memory[1:].view(rows, cols + gap)[:, :cols]
    return view.copy_(tensor)


@pytest.mark.parametrize("weight_dtype", [F32, BF16, I8], ids=str)
@pytest.mark.parametrize("M", [3, 40])
def test_row_strides_and_unaligned_memory(isa, weight_dtype, M):
    layer = make_layer(M, 50, 41, 5, BF16, weight_dtype)
    operands = {name: strided(getattr(layer, name), gap=3) for name in ("x", "weight", "A", "B", "g")}
    check(replace(layer, **operands))


def test_any_stride_of_the_inputs(isa):
    layer = make_layer(40, 50, 41, 5)
    transposed = {name: getattr(layer, name).t().contiguous().t() for name in ("x", "A", "B", "g")}
    check(replace(layer, **transposed))
    check(replace(layer, g=torch.tensor(0.5).expand(40, 41)))
    check(replace(layer, x=torch.randn(89).as_strided((40, 50), (1, 1))).with_dropout(0.3))


@pytest.mark.parametrize("where", ["x", "weight"])
def test_nan_and_inf_propagate(isa, where):
    for M in (3, 40):
        layer = make_layer(M, 50, 41, 4)
        getattr(layer, where)[2, 5] = float("nan")
        getattr(layer, where)[1, 7] = float("inf")
        y, _ = layer.forward()
        assert torch.equal(y.isfinite(), layer.exact_forward()[0].isfinite())


@pytest.mark.parametrize("weight_dtype", [BF16, I8], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_library_route(isa, weight_dtype, p):
    layer = make_layer(66, 70, 45, 5, BF16, weight_dtype).with_dropout(p)
    with routes.forced("library"):
        check(layer)
        check(make_layer(66, 70, 45, 5, BF16, weight_dtype, transposed=True).with_dropout(p))


@pytest.mark.parametrize("weight_dtype", [BF16, I8], ids=str)
def test_library_route_in_panels(weight_dtype, monkeypatch):
    monkeypatch.setattr("pyadapt.ops.panels._PANEL_ELEMENTS", 64 * 150)
    with routes.forced("library"):
        check(make_layer(40, 150, 200, 5, BF16, weight_dtype))


@pytest.mark.parametrize("weight_dtype", [F32, I8], ids=str)
def test_reference_route(weight_dtype):
    with routes.forced("reference"):
        check(make_layer(40, 50, 41, 4, F32, weight_dtype).with_dropout(0.3))
        check(make_layer(40, 50, 41, 4, BF16, I8).with_dropout(1.0))


def test_float64_is_served(isa):
    layer = make_layer(5, 7, 9, 3, torch.float64, adapter_dtype=torch.float64).with_dropout(0.4)
    y, S = layer.forward()
    assert S.dtype == torch.float64
    for value, exact in zip((y, S), layer.exact_forward(), strict=True):
        assert_close(value, exact, "product", torch.float64)
    for value, exact in zip(layer.backward(S), layer.exact_backward(), strict=True):
        assert_close(value, exact, "product", torch.float64)


@pytest.mark.parametrize("weight_dtype", [F32, BF16, I8], ids=str)
def test_same_bits_for_any_number_of_threads(isa, weight_dtype):
    layer = make_layer(150, 300, 170, 16, BF16, weight_dtype).with_dropout(0.1)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, S = layer.forward()
        results.append((y, S, *layer.backward(S)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("route", ["fused", "library", "reference"])
@pytest.mark.parametrize("weight_dtype", [F32, I8], ids=str)
def test_opcheck(route, weight_dtype):
    layer = make_layer(40, 10, 12, 3, F32, weight_dtype).with_dropout(0.25)
    forward = (layer.x, layer.weight, layer.weight_scale, layer.bias, layer.A, layer.B, 1.5, 0.25, layer.seed, BF16)
    with routes.forced(route):
        torch.library.opcheck(torch.ops.pyadapt.lora_forward.default, forward)
        _, S = layer.forward()
        for need_dx in (True, False):
            backward = (layer.g, *forward[:3], layer.A, layer.B, S, 1.5, 0.25, layer.seed, need_dx)
            torch.library.opcheck(torch.ops.pyadapt.lora_backward.default, backward)


def test_references_have_the_op_signatures():
    layer = make_layer(5, 7, 9, 3).with_dropout(0.5)
    y, S = lora.lora_forward_reference(
        layer.x, layer.weight, None, layer.bias, layer.A, layer.B, 1.5, 0.5, layer.seed, F32
    )
    assert_close(y, layer.forward()[0].double(), "product", F32)
    assert_close(S, layer.forward()[1].double(), "product", F32)
