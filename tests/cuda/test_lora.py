"""The CUDA kernels of a LoRA layer against fp64 mathematics, by every route."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops.oracle import Layer
from ops.test_lora import check, strided

from pyadapt.ops import routes
from pyadapt.ops.kernels import cuda

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8

# M, K, N, r. Ragged on purpose, and one larger than any tile in every direction.
SHAPES = [
    (1, 1, 1, 1),
    (1, 33, 17, 3),
    (4, 16, 24, 16),
    (17, 40, 65, 16),
    (35, 64, 96, 65),
    (70, 130, 31, 4),
    (140, 72, 150, 8),
]


@pytest.fixture(autouse=True)
def _only_cuda_kernels(monkeypatch):
    """No test of this module passes because something else served."""

    def refuse(*arguments):
        raise AssertionError("plain torch served in place of a CUDA kernel")

    from pyadapt.ops import linear, lora

    for module, table in ((lora, "_FORWARD"), (lora, "_BACKWARD"), (linear, "_FORWARD"), (linear, "_DX")):
        monkeypatch.setitem(getattr(module, table), "reference", refuse)


@pytest.mark.parametrize("M_K_N_r", SHAPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
def test_values(place, int8, M_K_N_r):
    for dtype in place.dtypes:
        check(place.layer(*M_K_N_r, dtype=dtype, weight_dtype=I8 if int8 else dtype))


@pytest.mark.parametrize("M", [1, 5, 9, 16])
@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
def test_few_rows(place, int8, M):
    """The skinny kernel; 16-byte loads and ragged ones."""
    for K in (128, 200, 77):
        layer = place.layer(M, K, 50, 5, weight_dtype=I8 if int8 else place.dtype)
        assert routes.choose(routes.case_of("forward", layer.x, layer.weight, 5, layer.x.dtype, (F32, F32))) == "skinny"
        check(layer)


@pytest.mark.parametrize("M", [33, 64])
def test_skinny_up_to_its_limit(place, M):
    layer = place.layer(M, 96, 40, 4, weight_dtype=I8)
    y, S = cuda.lora_forward(
        layer.x, layer.weight, layer.weight_scale, layer.bias, layer.A, layer.B, 1.5, 0.0, None, place.dtype, True
    )
    fused, _ = layer.forward()
    assert torch.allclose(y.float(), fused.float(), rtol=2e-2, atol=2e-2)
    assert S.shape == (M, 4)


@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
@pytest.mark.parametrize("M", [3, 40])
def test_weight_stored_transposed(place, M, int8):
    check(place.layer(M, 70, 53, 5, weight_dtype=I8 if int8 else place.dtype, transposed=True))
    check(place.layer(M, 64, 48, 5, weight_dtype=I8 if int8 else place.dtype, transposed=True))


@pytest.mark.parametrize("adapter_dtype", [BF16, F16], ids=str)
def test_adapters_in_16_bits(place, adapter_dtype):
    check(place.layer(34, 50, 41, 16, adapter_dtype=adapter_dtype))


@pytest.mark.parametrize("r", [1, 8, 33, 70])
def test_ranks(place, r):
    check(place.layer(20, 40, 36, r).with_dropout(0.2))


@pytest.mark.parametrize("M", [3, 40])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
def test_dropout(place, int8, p, M):
    check(place.layer(M, 70, 41, 4, weight_dtype=I8 if int8 else place.dtype).with_dropout(p))


def test_the_seed_may_be_a_number(place):
    """A seed on the CPU is passed as a number; the bits are the same."""
    layer = place.layer(20, 40, 36, 4).with_dropout(0.4, seed=-(2**62) + 12345)
    on_device = cuda.shrink(layer.x, layer.A, 0.4, layer.seed)
    S = torch.empty_like(on_device)
    core = cuda._core()
    size = core.forward_workspace(20, 0, 40, 4, place.dtype == BF16, False, False, 0)
    scratch = torch.empty(max(size, 1), dtype=I8, device=place.device)
    core.lora_shrink(layer.x, layer.A, S, 0.4, int(layer.seed), scratch, cuda._stream(layer.x))
    assert torch.equal(S, on_device)


@pytest.mark.parametrize("p", [0.1, 0.7])
def test_the_mask_is_the_cpus(place, p):
    """Ones through an identity: S and dx show which elements survive."""
    K, M, seed = 37, 21, torch.tensor([987654321987])
    x = torch.ones(M, K, dtype=place.dtype, device=place.device)
    eye = torch.eye(K, device=place.device)
    S = cuda.shrink(x, eye, p, seed.to(place.device))
    from pyadapt.ops.philox import keep_mask

    kept = keep_mask(seed, p, M, K).to(place.device)
    assert torch.equal(S != 0, kept)
    dx = cuda.expand_dx_(torch.zeros_like(x), torch.ones_like(S), eye, p, seed.to(place.device))
    assert torch.equal(dx != 0, kept)


def test_without_dx(place):
    check(place.layer(40, 50, 41, 4, weight_dtype=I8), need_dx=False)


@pytest.mark.parametrize("M", [0, 1, 33])
def test_empty_and_small_batches(place, M):
    check(place.layer(M, 20, 30, 4))
    check(place.layer(M, 20, 30, 4, weight_dtype=I8))


def test_no_rank_is_the_frozen_layer(place):
    for M in (4, 40):
        layer = place.layer(M, 50, 41, 0)
        frozen = torch.ops.pyadapt.linear_forward(layer.x, layer.weight, None, layer.bias, place.dtype)
        assert torch.equal(layer.forward()[0], frozen)


@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
@pytest.mark.parametrize("M", [4, 40])
def test_the_frozen_layer(place, M, int8):
    from tolerance import assert_close

    layer = place.layer(M, 50, 41, 1, weight_dtype=I8 if int8 else place.dtype, bias=False)
    y = torch.ops.pyadapt.linear_forward(layer.x, layer.weight, layer.weight_scale, None, place.dtype)
    dx = torch.ops.pyadapt.linear_dx(layer.g, layer.weight, layer.weight_scale, place.dtype)
    exact_y, exact_dx = layer.exact_frozen()
    assert_close(y, exact_y, "product", place.dtype, "y")
    assert_close(dx, exact_dx, "product", place.dtype, "dx")


def test_no_bias_and_any_bias(place):
    check(place.layer(40, 50, 41, 4, bias=False))
    layer = place.layer(40, 50, 41, 4)
    check(replace(layer, bias=layer.bias.float()))


@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
@pytest.mark.parametrize("M", [3, 40])
def test_row_strides_and_unaligned_memory(place, int8, M):
    layer = place.layer(M, 50, 41, 5, weight_dtype=I8 if int8 else place.dtype)
    operands = {name: strided(getattr(layer, name), gap=3) for name in ("x", "weight", "A", "B", "g")}
    check(replace(layer, **operands))


def test_any_stride_of_the_inputs(place):
    layer = place.layer(40, 50, 41, 5)
    transposed = {name: getattr(layer, name).t().contiguous().t() for name in ("x", "A", "B", "g")}
    check(replace(layer, **transposed))
    check(replace(layer, g=torch.tensor(0.5, dtype=place.dtype, device=place.device).expand(40, 41)))


@pytest.mark.parametrize("where", ["x", "weight"])
def test_nan_and_inf_propagate(place, where):
    for M in (3, 40):
        layer = place.layer(M, 50, 41, 4)
        getattr(layer, where)[2, 5] = float("nan")
        getattr(layer, where)[1, 7] = float("inf")
        y, _ = layer.forward()
        assert torch.equal(y.isfinite(), layer.exact_forward()[0].isfinite())


def test_a_dropped_nan_is_dropped(place):
    layer = place.layer(20, 24, 16, 4).with_dropout(1.0)
    layer.x.fill_(float("nan"))
    assert not cuda.shrink(layer.x, layer.A, 1.0, layer.seed).any()


def test_fp16_neither_overflows_nor_underflows(place):
    """Integers of an int8 W times x pass 65504 before the scale; a small g times a small scale falls below 6e-8."""
    layer = place.layer(20, 256, 40, 4, dtype=F16, weight_dtype=I8)
    big = replace(layer, x=layer.x * 30, weight_scale=layer.weight_scale / 100, A=layer.A / 100, g=layer.g * 1e-3)
    for route in ("fused", "library"):
        with routes.forced(route):
            check(big)


@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_library_route(place, int8, p):
    for dtype in place.dtypes:
        with routes.forced("library"):
            check(place.layer(66, 70, 45, 5, dtype=dtype, weight_dtype=I8 if int8 else dtype).with_dropout(p))
            transposed = place.layer(
                66, 70, 45, 5, dtype=dtype, weight_dtype=I8 if int8 else dtype, transposed=True
            ).with_dropout(p)
            check(transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_fp32_weight_under_16_bit_activations(place, transposed):
    """As autocast has it: torch's GEMM on W cast by panels, the low-rank passes native."""
    layer = place.layer(66, 70, 45, 5, weight_dtype=F32, transposed=transposed).with_dropout(0.3)
    case = routes.case_of("forward", layer.x, layer.weight, 5, place.dtype, (F32, F32))
    assert routes.choose(case) == "library"
    check(layer)


def test_library_route_in_panels(place, monkeypatch):
    for name in ("_PANEL_ELEMENTS", "_PANEL_ELEMENTS_CUDA"):
        monkeypatch.setattr(f"pyadapt.ops.panels.{name}", 64 * 150)
    with routes.forced("library"):
        check(place.layer(40, 150, 200, 5, weight_dtype=I8))


def results(layer: Layer) -> list[torch.Tensor]:
    y, S = layer.forward()
    return [y, S, *layer.backward(S)]


@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
def test_two_runs_give_the_same_bits(place, int8):
    for M in (4, 150):
        layer = place.layer(M, 130, 140, 16, weight_dtype=I8 if int8 else place.dtype).with_dropout(0.1)
        assert all(torch.equal(a, b) for a, b in zip(results(layer), results(layer), strict=True))


def test_opcheck(place):
    layer = place.layer(40, 24, 12, 3, weight_dtype=I8).with_dropout(0.25)
    forward = (
        layer.x,
        layer.weight,
        layer.weight_scale,
        layer.bias,
        layer.A,
        layer.B,
        1.5,
        0.25,
        layer.seed,
        place.dtype,
    )
    torch.library.opcheck(torch.ops.pyadapt.lora_forward.default, forward)
    _, S = layer.forward()
    backward = (layer.g, *forward[:3], layer.A, layer.B, S, 1.5, 0.25, layer.seed, True)
    torch.library.opcheck(torch.ops.pyadapt.lora_backward.default, backward)
