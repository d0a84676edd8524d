"""Gradients through the CUDA kernels: the autograd Functions, a whole model, a compiled one."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, model_batch
from ops.oracle import Owner
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import pyadapt
from pyadapt import LoraConfig
from pyadapt.ops import routes
from pyadapt.ops.linear import FrozenLinear
from pyadapt.ops.lora import LoraLinear

I8 = torch.int8


@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
@pytest.mark.parametrize("leading", [(40,), (2, 3, 7), (5, 1)], ids=str)
def test_lora(place, int8, leading):
    M = torch.Size(leading).numel()
    layer = place.layer(M, 48, 40, 4, weight_dtype=I8 if int8 else place.dtype).with_dropout(0.2)
    owner = Owner(layer.weight, layer.weight_scale, layer.bias)
    x, A, B = (t.clone().requires_grad_() for t in (layer.x.view(*leading, 48), layer.A, layer.B))
    y = LoraLinear.apply(x, A, B, owner, layer.scaling, 0.2, layer.seed, place.dtype)
    assert y.shape == (*leading, 40)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), layer.g.view(*leading, 40))
    exact_dx, exact_dA, exact_dB = layer.exact_backward()
    assert_close(dx.view(M, 48), exact_dx, "product", place.dtype, "dx", part=layer.exact_frozen()[1])
    assert_close(dA, exact_dA, "product", torch.float32, "dA")
    assert_close(dB, exact_dB, "product", torch.float32, "dB")


def test_frozen(place):
    layer = place.layer(40, 48, 40, 1, weight_dtype=I8)
    x = layer.x.clone().requires_grad_()
    y = FrozenLinear.apply(x, Owner(layer.weight, layer.weight_scale, layer.bias), place.dtype)
    (dx,) = torch.autograd.grad(y, x, layer.g)
    assert_close(dx, layer.exact_frozen()[1], "product", place.dtype, "dx")


def model_here(place, int8=False, **config):
    model = build("llama").to(place.device, place.dtype)
    if int8:
        pyadapt.quantize(model)
    return pyadapt.wrap(model, LoraConfig(r=4, init_lora_weights=False, **config)).train()


def step(place, model):
    torch.manual_seed(0)
    batch = {name: value.to(place.device) for name, value in model_batch("llama").items()}
    loss = model(**batch).loss
    loss.backward()
    grads = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_same_step(place, found, expected):
    assert_close(found[0], expected[0].double(), "loss", torch.bfloat16, "loss")
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient.double(), "gradient", torch.bfloat16, name)


@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
def test_a_wrapped_model_as_the_reference_has_it(place, int8):
    model = model_here(place, int8, lora_dropout=0.3)
    twin = copy.deepcopy(model)
    found = step(place, model)
    with routes.forced("reference"):
        expected = step(place, twin)
    assert_same_step(place, found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, None], ids=["fp32 model", "16-bit model"])
def test_under_autocast_activations_become_16_bits(place, dtype):
    """A norm gives fp32 under autocast; the layer casts it as torch's own would, and the kernels serve."""
    layer = torch.nn.Linear(48, 40).to(place.device, dtype or place.dtype)
    model = pyadapt.wrap(torch.nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(70, 48, device=place.device, requires_grad=True)
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "pyadapt":
                seen.append(args[0].dtype)
            return op(*args, **(kwargs or {}))

    with torch.autocast(place.device.type, place.dtype), Seen():
        y = model(x)
        y.float().sum().backward()
    assert y.dtype == place.dtype
    assert seen == [place.dtype, place.dtype]
    assert x.grad.dtype == torch.float32
    unit = model[0].adapters["default"]
    W = layer.weight.detach().double() + unit.scaling * unit.lora_B.detach().double() @ unit.lora_A.detach().double()
    assert_close(y, x.detach().double() @ W.t() + layer.bias.detach().double(), "product", torch.bfloat16, "y")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(place, backend):
    model = model_here(place)
    twin = copy.deepcopy(model)
    found = step(place, torch.compile(model, backend=backend, fullgraph=True))
    assert_same_step(place, found, step(place, twin))


def test_training_moves_the_loss(place):
    model = model_here(place, True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(step(place, model)[0])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
