"""Which kernels a call launches, as the emulated device has seen them; a GPU keeps no such list."""

from __future__ import annotations

import pytest
import torch
from ops.test_lora import check
from places import GPU

from pyadapt.ops import routes

I8 = torch.int8

pytestmark = pytest.mark.skipif(GPU, reason="asks the emulated device: run without a GPU")


@pytest.fixture
def launched(place, emulated):
    """The names of the kernels launched since the last call, each once, in order."""
    from emulator import control

    def names():
        found = [launch["kernel"] for launch in control.launches(emulated)]
        control.reset(emulated)
        known = ("gemm_kernel", "skinny_kernel", "shrink_kernel", "gradient_kernel", "input_kernel", "dequantize")
        return list(dict.fromkeys(name for kernel in found for name in known if name in kernel))

    return names


@pytest.mark.parametrize("M", [8, 40])
def test_a_layer(place, launched, M):
    layer = place.layer(M, 48, 40, 4, weight_dtype=I8)
    _, S = layer.forward()
    assert launched() == ["shrink_kernel", "skinny_kernel" if M == 8 else "gemm_kernel"]
    layer.backward(S)
    assert launched() == ["gradient_kernel", "input_kernel", "gemm_kernel"]
    layer.backward(S, need_dx=False)
    assert launched() == ["gradient_kernel", "input_kernel"]


def test_the_library_route(place, launched):
    layer = place.layer(40, 48, 40, 4, weight_dtype=I8)
    with routes.forced("library"):
        _, S = layer.forward()
        assert launched() == ["shrink_kernel", "dequantize", "gemm_kernel"]
        layer.backward(S)
        assert launched() == ["gradient_kernel", "input_kernel", "dequantize", "gemm_kernel"]


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_small_and_large_devices(place, launched, emulated, multiprocessors):
    """How work is cut depends on the multiprocessors: depths in slices, tiles of another size."""
    from emulator import control

    control.set_multiprocessors(emulated, multiprocessors)
    for M in (5, 140):
        check(place.layer(M, 700, 150, 20, weight_dtype=I8).with_dropout(0.1))
        check(place.layer(M, 150, 700, 20).with_dropout(0.1))
    assert launched()
