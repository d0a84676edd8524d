"""The stand-in CUDA runtime under nvcc's own host code: launches refused, failures, counters."""

from __future__ import annotations

import ctypes
import json

import numpy as np
import pytest
from emulator import build, control

SOURCE = build.ROOT / "tests" / "emulator" / "ptx_cases" / "launches.cu"

INVALID_VALUE, INVALID_CONFIGURATION, NO_IMAGE = 1, 9, 209
ILLEGAL_ADDRESS, MISALIGNED, LAUNCH_FAILURE = 700, 716, 719
SHARED_OPT_IN = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin
KB = 1024


@pytest.fixture(scope="session")
def path():
    """The kernels of launches.cu, through nvcc and the translator."""
    return build.build(recipe=build.Recipe("cudart.so", [SOURCE]))


@pytest.fixture
def runtime(path):
    """The library, as it is at its start."""
    library = control.library(path)
    library.error_name.restype = ctypes.c_char_p
    control.set_capability(path, 80)
    control.reset(path)
    library.set_device(0)
    yield library
    control.set_capability(path, 80)
    library.set_device(0)


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def scale(runtime, n=100, grid=(4, 1, 1), threads=32, shared=0):
    """Launch through launch.cuh; the error and what was written."""
    values = np.arange(n, dtype=np.float32)
    out = np.full(n + 1, np.nan, np.float32)
    extent = (ctypes.c_uint * 3)(*grid)
    error = runtime.launch_scale(pointer(values), pointer(out), n, extent, threads, ctypes.c_size_t(shared))
    return error, out


def sums(runtime, n=32, shared=4 * 32, offset=0):
    values = np.arange(n + 1, dtype=np.float32)
    out = np.full(1, np.nan, np.float32)
    source = ctypes.c_void_p(values.ctypes.data + offset)
    return runtime.launch_unasked(source, pointer(out), n, ctypes.c_size_t(shared)), out[0]


def test_a_launch(runtime):
    error, out = scale(runtime)
    assert error == 0
    np.testing.assert_array_equal(out, [*(2.0 * i for i in range(100)), 800])


def test_chevrons(runtime):
    values, out = np.arange(40, dtype=np.float32), np.zeros(41, np.float32)
    assert runtime.launch_chevrons(pointer(values), pointer(out), 40) == 0
    np.testing.assert_array_equal(out, [*(3.0 * i for i in range(40)), 800])


@pytest.mark.parametrize(
    ("configuration", "error"),
    [
        ({"threads": 0}, INVALID_CONFIGURATION),
        ({"threads": 1025}, INVALID_CONFIGURATION),
        ({"threads": 257}, INVALID_VALUE),  # __launch_bounds__(256)
        ({"grid": (0, 1, 1)}, INVALID_CONFIGURATION),
        ({"grid": (1, 65536, 1)}, INVALID_CONFIGURATION),
        ({"grid": (1, 1, 65536)}, INVALID_CONFIGURATION),
        ({"shared": 163 * KB + 1}, INVALID_VALUE),
        ({"shared": 163 * KB}, 0),
        ({"threads": 256, "grid": (1, 2, 2)}, 0),
    ],
)
def test_configurations(runtime, configuration, error):
    got, out = scale(runtime, **configuration)
    assert got == error
    assert np.isnan(out).all() == (error != 0)  # a launch that is refused runs nothing
    assert runtime.last_error() == error
    assert runtime.last_error() == 0


def test_more_shared_memory_than_was_asked_for(runtime, path):
    assert sums(runtime, shared=48 * KB) == (0, 496)
    assert sums(runtime, shared=48 * KB + 4)[0] == INVALID_VALUE
    assert runtime.ask_for_shared(64 * KB) == 0
    assert sums(runtime, shared=64 * KB) == (0, 496)
    runtime.set_device(1)  # where nobody has asked
    assert sums(runtime, shared=64 * KB)[0] == INVALID_VALUE


@pytest.mark.parametrize(
    ("capability", "limit"), [(75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
)
def test_shared_memory_by_capability(runtime, path, capability, limit):
    control.set_capability(path, capability)
    value = ctypes.c_int()
    assert runtime.attribute(SHARED_OPT_IN, 1, ctypes.byref(value)) == 0
    assert value.value == limit * KB
    assert runtime.ask_for_shared(limit * KB) == 0
    assert runtime.ask_for_shared(limit * KB + 1) == INVALID_VALUE


def test_a_capability_takes_its_own_kernels(runtime, path):
    for capability, architecture in ((75, 750), (80, 800), (75, 750), (90, 800)):
        control.set_capability(path, capability)
        error, out = scale(runtime)
        assert (error, out[-1]) == (0, architecture)
    control.set_capability(path, 70)
    assert scale(runtime)[0] == NO_IMAGE
    assert runtime.error_name(NO_IMAGE) == b"cudaErrorNoKernelImageForDevice"


def test_failures_inside_a_kernel(runtime, path):
    """Named, with the kernel and the thread; the next launch works."""
    out = np.zeros(32, np.float32)
    assert runtime.launch_trap(pointer(out)) == LAUNCH_FAILURE
    assert "trap_kernel" in control.last_failure(path)
    assert "trap (block 0,0,0 thread 3)" in control.last_failure(path)
    assert runtime.peek_error() == LAUNCH_FAILURE
    assert sums(runtime, shared=64)[0] == ILLEGAL_ADDRESS
    assert "outside the 64 bytes of shared memory" in control.last_failure(path)
    assert sums(runtime, offset=2)[0] == MISALIGNED
    assert "is not a multiple of 4" in control.last_failure(path)
    assert runtime.last_error() == MISALIGNED
    assert sums(runtime) == (0, 496)


def test_a_launch_that_was_told_to_fail(runtime, path):
    control.fail_next_launch(path, 2)
    error, out = scale(runtime)
    assert error == 2
    assert np.isnan(out).all()
    assert scale(runtime)[0] == 0


def test_two_devices(runtime):
    assert runtime.device_count() == 2
    assert runtime.set_device(1) == 0
    assert runtime.set_device(2) == 101
    assert runtime.attribute(SHARED_OPT_IN, 2, ctypes.byref(ctypes.c_int())) == 101


def test_counters(runtime, path):
    assert control.launches(path) == []
    scale(runtime)
    sums(runtime)
    scale(runtime, threads=0)  # refused: no launch
    first, second = control.launches(path)
    assert "scale_kernel<2>" in first["kernel"]
    assert (first["grid"], first["block"], first["blocks"], first["barriers"]) == ([4, 1, 1], [32, 1, 1], 4, 0)
    assert (second["shared"], second["barriers"], second["mma"]) == (128, 1, 0)
    json.dumps(second)


@pytest.mark.parametrize("order", control.ORDERS)
def test_orders_give_the_same(runtime, path, order):
    control.set_order(path, order, seed=7)
    error, out = scale(runtime)
    control.set_order(path, "forward")
    assert error == 0
    np.testing.assert_array_equal(out[:100], np.arange(100) * 2.0)


def test_nothing_is_built_twice(path, monkeypatch):
    """Objects are found by the hash of what they are made from."""
    monkeypatch.setattr(build, "_run", lambda *_, **__: pytest.fail("something was compiled again"))
    assert build.build(recipe=build.Recipe("cudart.so", [SOURCE])) == path


def test_a_changed_source_is_built_again(path, tmp_path):
    changed = tmp_path / "launches.cu"
    folder = (build.ROOT / "csrc" / "cuda").as_posix()
    changed.write_text(SOURCE.read_text().replace("../../../csrc/cuda", folder).replace("factor) *", "factor) + "))
    other = build.build(recipe=build.Recipe("cudart.so", [changed]))
    assert other != path
    control.library(other)
    error, out = scale(control.library(other))
    assert (error, out[5]) == (0, 7)


def test_a_compiler_that_refuses(tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void kernel() { nonsense }")
    with pytest.raises(build.BuildError, match=r"(?s)nvcc.*broken\.cu.*nonsense"):
        build.build(recipe=build.Recipe("broken.so", [broken]))
