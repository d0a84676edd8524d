"""IA3 on every kind and form of layer: convolutions, quantised weights, trained biases, compiled, checkpointed."""

from __future__ import annotations

import copy
import logging
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from ia3_cases import assert_gradients_equal, key_of, pair, quietly, randomise, train, wrapped
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch
from tolerance import assert_close
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import pyadapt
from pyadapt import IA3Config, LoraConfig
from pyadapt.base import base_of

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (9, 7), 3: (5, 6, 4)}
GEOMETRIES = [
    {},
    {"bias": False},
    {"groups": 2},
    {"stride": 2, "padding": 1, "groups": 2, "dilation": 2},
    {"padding": 1, "padding_mode": "circular"},
]
SIDES = {"output": [], "input": ["0"]}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def named(case):
    return "-".join(f"{key}={value}" for key, value in case.items()) or "plain"


# --- convolutions ----------------------------------------------------------------------------


def net(dims, dtype=F32, **options):
    torch.manual_seed(0)
    return nn.Sequential(CLASSES[dims](4, 6, **{"kernel_size": 3, **options})).to(dtype).eval()


def conv(dims, side, dtype=F32, **options):
    config = IA3Config(target_modules=["0"], feedforward_modules=SIDES[side])
    model = pyadapt.wrap(net(dims, dtype, **options), config)
    randomise(model)
    return model


def data(dims, dtype=F32, rows=2):
    return torch.randn(rows, 4, *SIZES[dims], generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", GEOMETRIES, ids=named)
@pytest.mark.parametrize("dims", [2, 3])
def test_convolutions_are_those_of_peft(dims, case, side):
    model = conv(dims, side, **case).train()
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=SIDES[side])
    twin = peft.get_peft_model(net(dims, **case), config).train()
    copy_adapter_to_peft(model, twin)
    x, x_peft = data(dims).requires_grad_(), data(dims).requires_grad_()
    y, expected = model(x), twin(x_peft)
    assert_near(y, expected, "layer")
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_near(model[0].adapters["default"].ia3_l.grad, twin.base_model.model[0].ia3_l["default"].grad, "gradient")
    assert_near(x.grad, x_peft.grad, "gradient")
    twin.merge_adapter()
    model.merge_adapter()
    assert_near(model[0].weight, twin.base_model.model[0].base_layer.weight, "merged")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", GEOMETRIES, ids=named)
@pytest.mark.parametrize("dims", CLASSES)
def test_convolutions_in_fp64(dims, case, side):
    """Also in one dimension, which peft lacks: merged is unmerged, gradients are right, with factors of 0 too."""
    model = conv(dims, side, F64, **case)
    x = data(dims, F64)
    unit = model[0].adapters["default"]
    assert unit.ia3_l.shape == (1, 6 if side == "output" else 4, *[1] * dims)
    with torch.no_grad():
        unit.ia3_l.view(-1)[1] = 0.0
    small = x[:1, ..., :4].clone().requires_grad_() if dims == 1 else None
    if small is not None:

        def run(x, l):
            return torch.func.functional_call(model, {"0.adapters.default.ia3_l": l}, (x,))

        assert torch.autograd.gradcheck(run, (x[:1].clone().requires_grad_(), unit.ia3_l))
    before, plain = model(x), net(dims, F64, **case)(x)
    assert not torch.allclose(before, plain)
    model.merge_adapter()
    assert_near(model(x), before, "merged")
    model.unmerge_adapter()
    assert torch.equal(model[0].weight, net(dims, F64, **case)[0].weight)
    assert_near(pyadapt.merge(model)(x), before, "merged")


def test_a_convolution_without_a_batch():
    """peft gives such an output a batch dimension."""
    model = conv(2, "output")
    x = data(2)
    assert_near(model(x[0]), model(x)[0], "layer")
    assert model(x[0]).dim() == 3


@pytest.mark.parametrize("value", [0.0, 1e-8, 1e-30])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_convolution_near_zero(dtype, value):
    model = conv(2, "output", dtype)
    l = model[0].adapters["default"].ia3_l
    with torch.no_grad():
        l[:, 2] = value
    x = data(2, dtype)
    y = model(x)
    g = torch.randn(y.shape).to(dtype)
    y.backward(g)
    z = net(2, dtype).double()(x.double())
    exact, part = (g.double() * z).sum((0, 2, 3)), (g.double() * z).abs().sum((0, 2, 3))
    assert_close(l.grad.flatten(), exact, "product", dtype, part=part)


def test_the_output_of_a_convolution_may_be_changed_in_place():
    grads = []
    for in_place in (False, True):
        model = conv(2, "output")
        nn.functional.relu(model(data(2)), inplace=in_place).square().sum().backward()
        grads.append(model[0].adapters["default"].ia3_l.grad)
    assert_near(grads[1], grads[0], "gradient")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_convolution_saves_one_output(dtype):
    model = conv(2, "output", dtype)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = data(2, dtype).requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    known = {t.untyped_storage().data_ptr() for t in (x, y, model[0].weight, model[0].adapters["default"].ia3_l)}
    assert set(storages) <= known


# --- quantised weights -----------------------------------------------------------------------


def dense_twin(model, name):
    """The plain model that holds the very weights that quantised ones stand for."""
    dense = build(name)
    for path, layer in model.named_modules():
        kind = base_of(layer)
        if kind is not None and kind.quantized:
            plain, W = dense.get_submodule(path), kind.matrix(layer)
            with torch.no_grad():
                plain.weight.copy_(W.t() if type(plain).__name__ == "Conv1D" else W)
    return dense


@pytest.fixture
def quantised(tmp_path_factory, monkeypatch):
    """A function of family and kind: a quantised model."""
    # On CPUs with AVX-512 bf16, bitsandbytes repacks 4-bit weights whose sizes fit; on others never. Here: never.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    def load(name, kind):
        if kind == "int8":
            return pyadapt.quantize(build(name))
        from transformers import BitsAndBytesConfig

        folder = tmp_path_factory.mktemp(name)
        dense = build(name)
        dense.save_pretrained(folder)
        head = FAMILIES[name].head
        skip = {} if head is None else {"llm_int8_skip_modules": [head]}
        option = {"load_in_8bit": True} if kind == "bnb8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config = BitsAndBytesConfig(**option, **skip)
        return type(dense).from_pretrained(folder, quantization_config=config, dtype=F32).eval()

    return load


@pytest.mark.parametrize("kind", ["int8", "bnb8", "bnb4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_training_over_quantised_weights(name, kind, quantised):
    base = quantised(name, kind)
    model, twin = pair(name, base, dense_twin(base, name))
    assert_gradients_equal(model, twin, model_batch(name))
    model.zero_grad()
    twin.zero_grad()
    batches = [model_batch(name, seed) for seed in range(4)]
    assert_near(train(model, batches), train(twin, batches), "loss")


@pytest.mark.parametrize("kind", ["int8", "bnb8", "bnb4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_over_quantised_weights(name, kind, quantised):
    """Into dequantised weights, and in place by quantising again; peft refuses both."""
    base = quantised(name, kind)
    exact = wrapped(name, dense_twin(base, name))
    model = wrapped(name, base)
    batch = model_batch(name)
    before = model(**batch).logits.detach()
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "adapters" not in key}
    model.merge_adapter()
    merged = model(**batch).logits.detach()
    assert (merged - before).norm() < 0.2 * before.norm()
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    plain = pyadapt.merge(model)
    assert not any(isinstance(layer, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)) for layer in plain.modules())
    assert_near(plain(**batch).logits, exact(**batch).logits, "merged")


# --- around the layer ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(7,), (0, 7), (5, 7), (2, 3, 7)])
def test_shapes_and_dtypes(shape, side, dtype):
    model = nn.Sequential(nn.Linear(7, 3)).to(dtype)
    pyadapt.wrap(model, IA3Config(target_modules=["0"], feedforward_modules=SIDES[side]))
    randomise(model)
    l = model[0].adapters["default"].ia3_l
    assert l.dtype == (F64 if dtype == F64 else F32)
    x = torch.randn(*shape).to(dtype).requires_grad_()
    y = model(x)
    W, b, wide = model[0].weight.double(), model[0].bias.double(), x.double()
    scale = l.double().flatten()
    exact = nn.functional.linear(wide, W, b) * scale if side == "output" else nn.functional.linear(wide * scale, W, b)
    assert y.dtype == dtype
    part = wide.abs() @ W.abs().t() + b.abs()
    assert_close(y, exact, "product", dtype, part=part)
    y.sum().backward()
    assert (x.grad.shape, l.grad.shape, l.grad.dtype) == (x.shape, l.shape, l.dtype)


@pytest.mark.parametrize("base", [F32, BF16])
def test_autocast(base):
    model, twin = pair("llama", build("llama", dtype=base))
    batches = [model_batch("llama", seed) for seed in range(4)]
    with torch.autocast("cpu", BF16):
        out, expected = model(**batches[0]), twin(**batches[0])
        assert out.logits.dtype == expected.logits.dtype
        assert_near(out.logits, expected.logits, "model", BF16)
        assert_near(train(model, batches), train(twin, batches), "loss", BF16)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("quantise", [False, True])
def test_gradient_checkpointing(name, reentrant, quantise):
    found = []
    for checkpointed in (False, True):
        model = wrapped(name, pyadapt.quantize(build(name)) if quantise else None).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**model_batch(name)).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        assert_near(again[key], gradient, "gradient")


@pytest.mark.parametrize("side", SIDES)
def test_a_bias_that_another_adapter_trains(side):
    """LoRA on another layer with bias="all": y = (x W' + b) * l with a gradient for b."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    pyadapt.wrap(model, IA3Config(target_modules=["0"], feedforward_modules=SIDES[side]), "scaled")
    model.add_adapter("biased", LoraConfig(target_modules=["1"], bias="all"))
    model.set_adapter(["scaled", "biased"])
    randomise(model, "scaled")
    x = torch.randn(6, 5, dtype=F64)
    model(x).square().sum().backward()
    l, b, W = model[0].adapters["scaled"].ia3_l, model[0].bias, model[0].weight
    found = l.grad.clone(), b.grad.clone()
    scale = l.detach().flatten().requires_grad_()
    bias = b.detach().clone().requires_grad_()
    y = nn.functional.linear(x, W, bias) * scale if side == "output" else nn.functional.linear(x * scale, W, bias)
    nn.functional.linear(y, model[1].weight, model[1].bias).square().sum().backward()
    assert_near(found[0].flatten(), scale.grad, "gradient")
    assert_near(found[1], bias.grad, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("quantise", [False, True])
def test_compiled_in_one_piece(backend, quantise):
    model = wrapped("llama", pyadapt.quantize(build("llama")) if quantise else None).train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    batch = model_batch("llama")
    for training in (True, False):
        compiled.train(training)
        eager.train(training)
        loss, expected = compiled(**batch).loss, eager(**batch).loss
        assert_near(loss, expected, "loss")
        loss.backward()
        expected.backward()
    for key, parameter in eager.named_parameters():
        if parameter.grad is not None:
            assert_near(model.get_parameter(key).grad, parameter.grad, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_a_compiled_convolution(side):
    model = conv(2, side).train()
    eager = copy.deepcopy(model)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(data(2))
    y.square().sum().backward()
    eager(data(2)).square().sum().backward()
    assert_near(model[0].adapters["default"].ia3_l.grad, eager[0].adapters["default"].ia3_l.grad, "gradient")


def test_a_module_that_is_trained_whole():
    with warnings.catch_warnings():
        model = wrapped("llama", modules_to_save=["lm_head"]).train()
        twin = quietly(peft.get_peft_model, build("llama"), peft.IA3Config(modules_to_save=["lm_head"])).train()
    copy_adapter_to_peft(model, twin)
    assert_gradients_equal(model, twin, model_batch("llama"))
    assert any("lm_head" in key_of(name) for name, p in model.named_parameters() if p.requires_grad)
