"""What the CUDA kernels refuse: an exception that says what and where, and the process goes on."""

from __future__ import annotations

import ctypes

import pytest
import torch
from places import GPU

from pyadapt import native
from pyadapt.ops import routes
from pyadapt.ops.kernels import cuda

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8


def forward(place, layer, **change):
    """One fused forward with some arguments changed."""
    arguments = {
        "x": layer.x,
        "weight": layer.weight,
        "weight_scale": layer.weight_scale,
        "bias": layer.bias,
        "A": layer.A,
        "B": layer.B,
        "scaling": 1.0,
        "dropout_p": 0.0,
        "seed": None,
        "out_dtype": layer.x.dtype,
        **change,
    }
    return cuda.lora_forward(**arguments)


def test_wrong_dtypes(place):
    layer = place.layer(20, 16, 24, 4)
    with pytest.raises(TypeError, match="x is float32; the CUDA kernels take float16 or bfloat16"):
        forward(place, layer, x=layer.x.float())
    with pytest.raises(TypeError, match="weight is float32; wanted"):
        forward(place, layer, weight=layer.weight.float())
    with pytest.raises(TypeError, match="y is float32; wanted"):
        forward(place, layer, out_dtype=F32)
    with pytest.raises(ValueError, match="weight is int8 but weight_scale is None"):
        forward(place, layer, weight=torch.zeros(24, 16, dtype=I8, device=place.device))


def test_a_weight_is_never_copied(place):
    """Without unit stride the kernels refuse it, and torch's GEMM serves."""
    layer = place.layer(20, 16, 24, 4)
    gaps = torch.empty(24, 32, dtype=place.dtype, device=place.device)[:, ::2]
    with pytest.raises(ValueError, match=r"weight has strides \(32, 2\).*unit stride along one of the two dimensions"):
        forward(place, layer, weight=gaps)
    case = routes.case_of("forward", layer.x, gaps, 4, place.dtype, (F32, F32))
    assert routes.choose(case) == "library"


def test_wrong_shapes(place):
    layer = place.layer(20, 16, 24, 4)
    with pytest.raises(ValueError, match=r"A has shape \(4, 15\); wanted \(r, K\) = \(4, 16\)"):
        forward(place, layer, A=layer.A[:, :15])
    with pytest.raises(ValueError, match=r"bias has shape \(23,\); wanted \(N,\) = \(24,\)"):
        forward(place, layer, bias=layer.bias[:23])


def test_dropout_needs_a_seed_and_a_probability(place):
    layer = place.layer(20, 16, 24, 4)
    with pytest.raises(ValueError, match="no seed was given"):
        forward(place, layer, dropout_p=0.5)
    with pytest.raises(ValueError, match=r"dropout_p is 1.5.*in \[0, 1\]"):
        forward(place, layer, dropout_p=1.5, seed=torch.tensor([1], device=place.device))


def test_too_little_workspace(place):
    layer = place.layer(20, 16, 24, 4, weight_dtype=I8)
    dx, dA, dB = torch.empty_like(layer.x), torch.empty_like(layer.A), torch.empty_like(layer.B)
    _, S = layer.forward()
    with pytest.raises(ValueError, match="workspace has too few bytes"):
        cuda._core().lora_backward(
            layer.g,
            layer.x,
            layer.weight,
            layer.weight_scale,
            layer.A,
            layer.B,
            S,
            dx,
            dA,
            dB,
            1.0,
            0.0,
            None,
            None,
            cuda._stream(layer.x),
        )


def test_bf16_on_sm_75_is_served_by_the_library(place):
    if place.isa != "sm_75":
        assert BF16 in place.dtypes
        return
    x, weight = torch.zeros(100, 8, dtype=BF16), torch.zeros(6, 8, dtype=BF16)
    assert routes.choose(routes.case_of("forward", x, weight, 4, BF16, (F32, F32))) == "library"
    with pytest.raises(RuntimeError, match=r"failed on cuda:0: cudaErrorNotSupported"):
        cuda.linear_forward(x, weight, None, None, BF16)


def test_a_launch_that_fails_says_what_and_where(place, request):
    if GPU:
        pytest.skip("needs the emulated device, which can be told to fail: run without a GPU")
    from emulator import control

    module, layer = request.getfixturevalue("emulated"), place.layer(20, 16, 24, 4)
    for code, name in ((2, "cudaErrorMemoryAllocation"), (701, "cudaErrorLaunchOutOfResources")):
        control.fail_next_launch(module, code)
        with pytest.raises(RuntimeError, match=rf"the S pass failed on cuda:0: {name}"):
            forward(place, layer)
        y, _ = forward(place, layer)  # and it goes on
        assert y.isfinite().all()


def on_device(tensor, number):
    """A DLPack capsule of a tensor that says it lies on another device of the same kind."""
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    # A DLTensor begins with the address of its data, its kind of device and the device's number.
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 12).value = number
    return capsule


def test_tensors_on_two_devices(place):
    layer = place.layer(20, 16, 24, 4)
    S = torch.empty(20, 4, device=place.device)
    with pytest.raises(ValueError, match="A is on cuda:1, but x is on cuda:0; wanted all on one device"):
        cuda._core().lora_shrink(layer.x, on_device(layer.A, 1), S, 0.0, None, None, cuda._stream(layer.x))


@pytest.mark.skipif(not GPU, reason="two kinds of memory need a GPU: run the suite on a machine with one")
def test_tensors_on_the_cpu(place):
    layer = place.layer(20, 16, 24, 4)
    with pytest.raises(ValueError, match="A is on the CPU; wanted a CUDA device"):
        forward(place, layer, A=layer.A.cpu())


@pytest.mark.skipif(GPU, reason="a CUDA tensor is what these kernels want: run without a GPU")
def test_the_real_module_refuses_cpu_tensors_by_name(place):
    """The emulated build takes CPU memory; what it does not take it names."""
    layer = place.layer(20, 16, 24, 4)
    with pytest.raises(ValueError, match="x cannot be read as plain memory"):
        forward(place, layer, x=layer.x.to("meta"))


@pytest.mark.parametrize(
    ("architectures", "capability", "serves"),
    [
        ("75-real,80-real,90-real,120", 75, True),
        ("75-real,80-real,90-real,120", 86, True),
        ("80-real,90-real,120", 75, False),
        ("80-real,90-real,120", 100, False),
        ("80-real,90-real,120", 121, True),
        ("80-virtual", 100, True),
        ("80", 100, True),
        ("90a-real", 90, True),
        ("86-real", 80, False),
    ],
)
def test_which_devices_a_build_serves(architectures, capability, serves):
    assert native.architectures_serve(architectures, capability) is serves


def test_a_device_that_the_build_lacks(monkeypatch):
    """Named together with what was built, once; the library or the reference serves."""
    from types import SimpleNamespace

    module = SimpleNamespace(architectures="90-real", capability=lambda device: 80)
    monkeypatch.setattr(native, "_emulated", None)
    monkeypatch.setattr(native, "_load_cuda", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    native._cuda_isa.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"built for 90-real, which does not serve cuda:0 \(Some GPU, sm_80\)"):
            assert native.cuda_isa() is None
        assert native.cuda_isa() is None  # without another warning
    finally:
        native._cuda_isa.cache_clear()
