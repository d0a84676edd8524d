"""quantize: int8 weights in place, what they are, what is left alone, and the files that hold them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from models import ALL, FAMILIES, assert_near, build, model_batch, plain_module, snapshot
from safetensors.torch import load_file
from torch import nn

import pyadapt
from pyadapt import LoraConfig

HEADS = {
    "llama": "lm_head",
    "gpt2": "lm_head",
    "t5": "lm_head",
    "bert": "classifier",
    "vit": "classifier",
    "olmo": "lm_head",
}


def int8_layers(model):
    return [path for path, module in model.named_modules() if hasattr(module, "weight_scale")]


def stored(layer):
    """(int8 weight, fp32 scale) as plain tensors."""
    return layer.weight.detach(), layer.weight_scale.detach().view(torch.float32)


@pytest.mark.parametrize("name", ALL)
def test_weights_are_those_of_the_definition(name):
    plain, model = build(name), build(name)
    assert pyadapt.quantize(model) is model
    paths = int8_layers(model)
    assert len(paths) == FAMILIES[name].all_linear_count
    for path in paths:
        layer, old = model.get_submodule(path), plain.get_submodule(path)
        W = old.weight.detach().t() if type(old).__name__ == "Conv1D" else old.weight.detach()
        q, scale = stored(layer)
        assert q.dtype == torch.int8
        assert q.shape == W.shape
        # scale[n] = max |W[n]| / 127; q = W / scale to the nearest, so that no value is off by more than half a step.
        assert torch.equal(scale, W.abs().amax(1) / 127)
        assert int(q.abs().amax()) == 127
        assert bool((q.abs().amax(1) == 127).all())
        step = scale[:, None].double()
        assert bool(((q * step - W.double()).abs() <= 0.5 * step * (1 + 1e-6)).all())
        assert type(layer).__name__ == type(old).__name__
        assert isinstance(layer, type(old))
        assert not layer.weight.requires_grad
        assert not layer.weight_scale.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_layers_compute_with_the_dequantised_weight(name):
    model = pyadapt.quantize(build(name))
    path = int8_layers(model)[-1]
    layer = model.get_submodule(path)
    q, scale = stored(layer)
    x = torch.randn(2, 3, q.shape[1], requires_grad=True)
    twin = nn.functional.linear(x, q * scale[:, None], layer.bias)
    y = layer(x)
    assert_near(y, twin, "layer")
    (gradient,) = torch.autograd.grad(y.sin().sum(), x)
    (expected,) = torch.autograd.grad(twin.sin().sum(), x)
    assert_near(gradient, expected, "gradient")


@pytest.mark.parametrize("name", ALL)
def test_the_model_stays_near_the_dense_one(name):
    batch = model_batch(name)
    dense = build(name)(**batch).logits
    quantised = pyadapt.quantize(build(name))(**batch).logits
    assert (quantised - dense).norm() < 0.05 * dense.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_has_the_dtype_of_the_input(dtype):
    model = nn.Sequential(nn.Linear(9, 5).to(dtype))
    pyadapt.quantize(model, skip=[])
    x = torch.randn(4, 9, dtype=dtype)
    assert model(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == (dtype if dtype == torch.float64 else torch.bfloat16)


@pytest.mark.parametrize("name", ALL)
def test_the_head_is_left_alone(name):
    model = pyadapt.quantize(build(name))
    assert HEADS[name] not in int8_layers(model)
    assert model.get_submodule(HEADS[name]).weight.dtype == torch.float32


def test_skip():
    model = pyadapt.quantize(build("llama"), skip=["q_proj", "layers.1"])
    taken = int8_layers(model)
    assert "lm_head" in taken
    assert not any(path.endswith("q_proj") or ".layers.1." in path for path in taken)
    assert len(taken) == 7
    nothing = pyadapt.quantize(build("llama"), skip=[])
    assert len(int8_layers(nothing)) == FAMILIES["llama"].all_linear_count + 1
    one = pyadapt.quantize(build("llama"), skip="lm_head")
    assert len(int8_layers(one)) == FAMILIES["llama"].all_linear_count


def refused(model, match, error=ValueError, **options):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        pyadapt.quantize(model, **options)
    assert snapshot(model) == before


def test_refused():
    refused(build("llama"), "'nowhere'", skip=["nowhere"])
    refused(build("llama"), "scheme 'int3'", scheme="int3")
    refused(nn.Sequential(nn.LayerNorm(3)), "no dense linear layer")
    refused(pyadapt.quantize(build("llama"), skip=[]), "quantised already")
    refused(pyadapt.wrap(build("llama"), LoraConfig()), "quantize the model first, then wrap it", RuntimeError)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_tied_head_is_refused_and_the_remedy_works(name):
    refused(build(name), r"lm_head shares its weight with .*; add 'lm_head' to skip", skip=[])
    assert int8_layers(pyadapt.quantize(build(name), skip=["lm_head"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(value):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 2] = value
    refused(model, r"model\.layers\.1\.mlp\.down_proj\.weight holds a NaN or an infinity")


def test_a_row_of_zeros():
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[2] = 0
    x = torch.randn(3, 6)
    expected = model(x)
    pyadapt.quantize(model, skip=[])
    assert_near(model(x)[:, 2], expected[:, 2], "layer")
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_the_int8_values_and_scales(dtype):
    model = pyadapt.quantize(plain_module())
    pyadapt.wrap(model, LoraConfig(target_modules=["encoder.0"]))
    before = {path: [t.clone() for t in stored(model.get_submodule(path))] for path in int8_layers(model)}
    model.to(dtype)
    assert model.classifier.weight.dtype == dtype
    for path, tensors in before.items():
        now = stored(model.get_submodule(path))
        assert all(torch.equal(new, old) for new, old in zip(now, tensors, strict=True))
    assert model(torch.randn(2, 7, dtype=dtype)).dtype == dtype


def test_deepcopy_and_pickle():
    model, batch = pyadapt.quantize(build("llama")), model_batch("llama")
    expected = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, expected)


def test_state_dict_round_trip():
    model, other = (pyadapt.quantize(build("llama", seed=seed)) for seed in (0, 1))
    other.load_state_dict(model.state_dict())
    batch = model_batch("llama")
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_plain_module():
    model = plain_module()
    x = torch.randn(4, 7)
    expected = model(x)
    pyadapt.quantize(model)
    assert int8_layers(model) == ["encoder.0", "encoder.2"]
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded(name, tmp_path):
    model, batch = pyadapt.quantize(build(name)), model_batch(name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "pyadapt_int8"
    dtypes = [tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()]
    assert dtypes.count(torch.int8) == dtypes.count(torch.int32) == FAMILIES[name].all_linear_count
    again = pyadapt.load_quantized(tmp_path)
    assert type(again) is type(build(name))
    assert int8_layers(again) == int8_layers(model)
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)
    # And on: wrap, train, merge.
    pyadapt.wrap(again, LoraConfig(target_modules=list(FAMILIES[name].targets), init_lora_weights=False))
    assert_near(pyadapt.merge(again)(**batch).logits, again(**batch).logits, "merged")


@pytest.mark.parametrize("skip", [["q_proj"], []])
def test_saved_and_loaded_with_skip(skip, tmp_path):
    model = pyadapt.quantize(build("llama"), skip=skip)
    model.save_pretrained(tmp_path)
    again = pyadapt.load_quantized(tmp_path)
    assert int8_layers(again) == int8_layers(model)
    batch = model_batch("llama")
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


def test_saved_in_bf16(tmp_path):
    model = pyadapt.quantize(build("llama", dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    again = pyadapt.load_quantized(tmp_path)
    batch = model_batch("llama")
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)
    merged = pyadapt.merge(pyadapt.wrap(again, LoraConfig()))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_the_adapter_over_int8_fits_the_dense_model(tmp_path):
    model = pyadapt.wrap(pyadapt.quantize(build("llama")), LoraConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert pyadapt.is_wrapped(pyadapt.load(build("llama"), tmp_path))


def test_load_quantized_of_something_else(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no int8 weights of pyadapt"):
        pyadapt.load_quantized(tmp_path)


def test_a_quantised_layer_cannot_be_trained_whole():
    model = pyadapt.quantize(build("llama"), skip=[])
    before = snapshot(model)
    with pytest.raises(ValueError, match="'lm_head' is quantised"):
        pyadapt.wrap(model, LoraConfig(modules_to_save=["lm_head"]))
    assert snapshot(model) == before


# --- memory -----------------------------------------------------------------------------------

# Four layers of 64 MB in a process of its own; the peak is that of the whole process, freed memory given back at once.
PEAK = """
import resource, sys
import torch
import pyadapt

torch.set_num_threads(1)
MB = 2**20
layer_mb = 64
side = int((layer_mb * MB // 4) ** 0.5)
model = torch.nn.Sequential(*(torch.nn.Linear(side, side, bias=False, device="meta") for _ in range(4)))
for layer in model:
    layer.weight = torch.nn.Parameter(torch.full((side, side), 0.5), requires_grad=False)
# Everything that is loaded at first use is loaded now.
pyadapt.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), skip=[])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
pyadapt.quantize(model, skip=[])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // MB
assert model[0].weight.dtype == torch.int8
print(before, after, resident)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of a process as Linux keeps it")
def test_peak_memory_is_the_model_and_one_layer():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after, resident = map(int, done.stdout.split())
    # The first layer is made int8 while all of the model is still there, itself included.
    assert after - before < 64
    # 256 MB have become 64.
    assert resident < before - 150
