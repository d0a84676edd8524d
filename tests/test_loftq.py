"""LoftQ: the quantised weight and the adapter that answers for what it lost, over dense and over quantised weights."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from models import build, copy_adapter_to_peft, model_batch, peft_twin, snapshot
from safetensors.torch import load_file, save_file
from tolerance import assert_close, assert_near
from torch import nn

import pyadapt
from pyadapt import AdapterFileError, LoraConfig
from pyadapt.base import base_of
from pyadapt.base.int8 import Int8
from pyadapt.methods.lora.loftq import normal_float_values

TARGETS = ["q_proj", "down_proj"]
PATHS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]


def options_of(bits=None, rounds=1, **options):
    loftq = {"loftq_iter": rounds, **({} if bits is None else {"loftq_bits": bits}), **options.pop("loftq", {})}
    return {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
        "init_lora_weights": "loftq",
        "loftq_config": loftq,
        **options,
    }


def wrapped(*how, **options):
    return pyadapt.wrap(build("llama"), LoraConfig(**options_of(*how, **options)))


def logits(model):
    return model(**model_batch("llama")).logits


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def matrix(model, path):
    layer = model.get_submodule(path)
    return base_of(layer).matrix(layer)


def error(model, original, path, name="default"):
    """|W - (Q + s B A)| / |W|, and the same without the adapter."""
    W, Q = original.get_submodule(path).weight.detach(), matrix(model, path)
    delta = model.get_submodule(path).unit(name).delta()
    return float((W - Q - delta).norm() / W.norm()), float((W - Q).norm() / W.norm())


@pytest.fixture
def cuda_is_cpu(monkeypatch):
    """peft moves the weight to "cuda" to quantise it; here that is the CPU, and the rest of its code runs as it is."""
    to = torch.Tensor.to

    def here(value):
        return "cpu" if str(value) == "cuda" else value

    def anywhere(tensor, *args, **kwargs):
        return to(tensor, *map(here, args), **{key: here(value) for key, value in kwargs.items()})

    monkeypatch.setattr(torch.Tensor, "to", anywhere)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.mark.usefixtures("cuda_is_cpu")
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_are_those_of_peft(bits, rounds, tmp_path):
    import peft

    options = options_of(bits, rounds)
    twin = peft_twin(build("llama"), **options)
    model = pyadapt.wrap(build("llama"), LoraConfig(**options))
    for path in PATHS:
        Q = twin.base_model.model.get_submodule(path).base_layer.weight
        assert_close(matrix(model, path), Q, "product", torch.float32)
        unit, theirs = model.get_submodule(path).unit("default"), twin.base_model.model.get_submodule(path)
        # The part of W that Q leaves is small beside W, whose rounding is in it.
        W = build("llama").get_submodule(path).weight.detach()
        assert_close(unit.delta(), theirs.get_delta_weight("default"), "product", torch.float32, part=W)
    assert_near(logits(model), logits(twin), "model")
    # Both ways, onto the model from before.
    moved(model)
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    assert_near(logits(again), logits(model), "model")
    copy_adapter_to_peft(model, twin)
    twin.save_pretrained(tmp_path / "peft")
    assert_near(logits(pyadapt.load(build("llama"), tmp_path / "peft")), logits(model), "model")


@pytest.mark.parametrize("alpha", [2, 4, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_adapter_takes_error_away_at_any_scaling(bits, alpha):
    """peft's factors leave the scaling out, so that at alpha = 2 r they put back what they take away; ours do not."""
    original = build("llama")
    model = wrapped(bits, lora_alpha=alpha)
    for path in PATHS:
        with_adapter, without = error(model, original, path)
        # The best that rank 4 can do for W - Q.
        W, Q = original.get_submodule(path).weight.detach(), matrix(model, path)
        best = torch.linalg.svdvals((W - Q).double())[4:].norm() / W.double().norm()
        assert with_adapter == pytest.approx(float(best), rel=1e-4)
        assert with_adapter < 0.8 * without


@pytest.mark.parametrize(("bits", "rounds"), [(2, 2), (4, 2), (4, 5), (8, 5)])
def test_more_rounds_take_more_error_away(bits, rounds):
    """At 2 bits, four levels, two rounds are about the best; more can be worse."""
    original = build("llama")
    once, often = wrapped(bits), wrapped(bits, rounds)
    for path in PATHS:
        assert error(often, original, path)[0] < error(once, original, path)[0]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(3, 64), (5, 7), (1, 1), (2, 96)])
def test_normal_float(bits, shape):
    """Each value is the nearest level of its block of 64, times the block's largest magnitude; zeros stay zeros."""
    W = torch.randn(shape)
    W[-1] = 0
    W[0, 0] = -3.5
    normal = torch.distributions.Normal(0, 1)
    half = 2 ** (bits - 1)
    above, below = (
        normal.icdf(torch.linspace(0.9677083, 0.5, n + 1, dtype=torch.float64)[:-1]) for n in (half, half - 1)
    )
    # Above zero there is one level more; each side reaches 1.
    levels = torch.cat([above / above[0], torch.zeros(1, dtype=torch.float64), -below / below[0]])
    assert len(levels.unique()) == 2**bits
    Q = normal_float_values(W, bits)
    for block, rounded in zip(W.flatten().split(64), Q.flatten().split(64), strict=True):
        peak = block.abs().max().double()
        nearest = (block.double()[:, None] - peak * levels).abs().argmin(1)
        assert_close(rounded, peak * levels[nearest], "product", torch.float32)


@pytest.mark.parametrize("shape", [(24, 36), (7, 129)])
def test_nf4_is_that_of_bitsandbytes(shape):
    import bitsandbytes.functional as bnb

    W = torch.randn(shape)
    packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert_close(normal_float_values(W, 4), bnb.dequantize_4bit(packed, state), "product", torch.float32)


def test_eight_bits_make_an_int8_layer(tmp_path):
    model = wrapped(8, 2)
    for path in PATHS:
        assert base_of(model.get_submodule(path)) is Int8
    loss = model(**model_batch("llama")).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    moved(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    pyadapt.unwrap(model)
    assert base_of(model.get_submodule(PATHS[0])) is Int8
    assert base_of(model.model.layers[0].self_attn.k_proj) is not Int8
    # The quantised model is saved and loaded as such, and the adapter fits it without being fitted again.
    model.save_pretrained(tmp_path / "base")
    loaded = pyadapt.load_quantized(tmp_path / "base")
    assert_near(logits(loaded), logits(model), "model")
    assert torch.equal(logits(pyadapt.load(loaded, tmp_path / "adapter")), wanted)
    # Onto the model from before, it quantises again, to the same.
    assert torch.equal(logits(pyadapt.load(build("llama"), tmp_path / "adapter")), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_bits_stay_in_the_dtype_of_the_layer(dtype, tmp_path):
    model = pyadapt.wrap(build("llama", dtype=dtype), LoraConfig(**options_of(4)))
    for path in PATHS:
        W = build("llama", dtype=dtype).get_submodule(path).weight.detach()
        assert torch.equal(model.get_submodule(path).weight, normal_float_values(W, 4).to(dtype))
    wanted = logits(moved(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(pyadapt.load(build("llama", dtype=dtype), tmp_path)), wanted)
    model.set_adapter("default")
    assert not torch.equal(logits(pyadapt.unwrap(model)), logits(build("llama", dtype=dtype)))


def test_conv1d():
    """peft factors the stored (K, N) weight, whose factors fit no layer; the oracle is the SVD of (N, K)."""
    original = build("gpt2")
    options = options_of(4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = pyadapt.wrap(build("gpt2"), LoraConfig(**options))
    path = "transformer.h.0.attn.c_attn"
    W, Q = original.get_submodule(path).weight.detach().t(), matrix(model, path)
    assert_close(Q, normal_float_values(W.contiguous(), 4), "product", torch.float32)
    best = torch.linalg.svdvals((W - Q).double())[4:].norm()
    assert float((W - Q - model.get_submodule(path).unit("default").delta()).norm()) == pytest.approx(
        float(best), rel=1e-4
    )


# --- over quantised weights -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    build("llama").save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@pytest.mark.parametrize("rounds", [1, 4])
def test_over_int8(rounds, folder, tmp_path):
    original, plain = build("llama"), pyadapt.quantize(build("llama"))
    before = snapshot(plain)["values"]
    model = pyadapt.wrap(plain, LoraConfig(**options_of(rounds=rounds, loftq={"original": folder}, lora_alpha=8)))
    for path in PATHS:
        with_adapter, without = error(model, original, path)
        assert with_adapter < 0.8 * without
    changed = {
        key for key, value in snapshot(pyadapt.quantize(build("llama")))["values"].items() if value != before[key]
    }
    assert not changed
    own = {key for key, value in model.state_dict().items() if key in before and _bits(value) != before[key][1]}
    assert {key.rpartition(".")[0] for key in own} == (set(PATHS) if rounds > 1 else set())
    # The adapter is a plain one now, which needs no original to be loaded.
    assert model.peft_config["default"].init_lora_weights is True
    wanted = logits(moved(model))
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["loftq_config"] == {}
    pyadapt.unwrap(model)
    assert torch.equal(logits(pyadapt.load(model, tmp_path / "adapter")), wanted)


def _bits(value):
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_more_rounds_over_int8_take_more_error_away(folder):
    original = build("llama")
    once, often = (
        pyadapt.wrap(
            pyadapt.quantize(build("llama")), LoraConfig(**options_of(rounds=rounds, loftq={"original": folder}))
        )
        for rounds in (1, 5)
    )
    for path in PATHS:
        assert error(often, original, path)[0] < error(once, original, path)[0]


def test_some_layers_quantised(folder, tmp_path):
    plain = pyadapt.quantize(build("llama"), skip=["q_proj", "lm_head"])
    model = pyadapt.wrap(plain, LoraConfig(**options_of(4, loftq={"original": folder})))
    original = build("llama")
    for path in PATHS:
        assert error(model, original, path)[0] < 0.8 * error(model, original, path)[1]
    wanted = logits(moved(model))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 1}
    again = pyadapt.quantize(build("llama"), skip=["q_proj", "lm_head"])
    assert torch.equal(logits(pyadapt.load(again, tmp_path)), wanted)


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_over_bitsandbytes(how, folder, monkeypatch):
    """`replace_lora_weights_loftq` gives what `wrap` gives, and takes back what the callback does not want."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kinds = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}

    def load():
        config = BitsAndBytesConfig(**kinds[how])
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()

    original = build("llama")
    options = options_of(loftq={"original": folder}, lora_alpha=8)
    model = pyadapt.wrap(load(), LoraConfig(**options))
    for path in PATHS:
        assert error(model, original, path)[0] < 0.8 * error(model, original, path)[1]
    late = pyadapt.wrap(load(), LoraConfig(**{**options, "init_lora_weights": True, "loftq_config": {}}))
    seen = []

    def keep(given, path):
        assert given is late
        seen.append(path)
        return "down_proj" not in path

    pyadapt.replace_lora_weights_loftq(late, folder, callback=keep)
    assert sorted(seen) == sorted(PATHS)
    for path in PATHS:
        delta = late.get_submodule(path).unit("default").delta()
        if "down_proj" in path:
            assert not delta.any()
        else:
            assert_near(delta, model.get_submodule(path).unit("default").delta(), "layer")
    # The folder that the model came from is the default.
    pyadapt.replace_lora_weights_loftq(late)
    assert late.get_submodule(PATHS[1]).unit("default").delta().any()
    often = pyadapt.wrap(load(), LoraConfig(**options_of(rounds=4, loftq={"original": folder})))
    assert all(error(often, original, path)[0] < error(model, original, path)[0] for path in PATHS)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loftq", "match"),
    [
        ({}, 'init_lora_weights="loftq" needs loftq_config'),
        ({"loftq_bits": 3}, "loftq_bits=3 is not one of 2, 4, 8"),
        ({"loftq_bits": "4"}, "loftq_bits='4' is not one of 2, 4, 8"),
        ({"loftq_iter": 0}, "loftq_iter=0: a whole number of at least 1"),
        ({"loftq_iter": 1.5}, "loftq_iter=1.5: a whole number"),
        ({"bits": 4}, "loftq_config has no 'bits'; known are loftq_bits, loftq_iter, original"),
    ],
    ids=str,
)
def test_bad_options(loftq, match):
    with pytest.raises(ValueError, match=match):
        LoraConfig(init_lora_weights="loftq", loftq_config=loftq)


def test_options_of_peft():
    import peft

    options = peft.LoftQConfig(loftq_bits=8, loftq_iter=2)
    config = LoraConfig(init_lora_weights="loftq", loftq_config=options)
    assert config.loftq_config == {"loftq_bits": 8, "loftq_iter": 2}
    theirs = peft.LoraConfig(target_modules=TARGETS, init_lora_weights="loftq", loftq_config=options)
    assert LoraConfig.from_peft(theirs).loftq_config == config.loftq_config


def test_options_without_loftq_are_a_warning(caplog):
    LoraConfig(loftq_config={"loftq_bits": 4})
    assert 'loftq_config is not used: init_lora_weights is not "loftq"' in caplog.text


def refused(model, match, error=ValueError, **options):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        pyadapt.wrap(model, LoraConfig(**options), "new")
    assert snapshot(model) == before


def test_quantised_without_original():
    told = rf"{PATHS[0]} is quantised already, and LoftQ needs its weight from before: loftq_config=.*original"
    refused(pyadapt.quantize(build("llama")), told, **options_of(4))


def test_originals_that_do_not_fit(folder, tmp_path):
    model = pyadapt.quantize(build("llama"))

    def options(path):
        # With more than one round each layer is quantised again for trial, and put back.
        return options_of(rounds=3, loftq={"original": path})

    refused(model, "holds no safetensors files", AdapterFileError, **options(tmp_path / "nowhere"))
    tensors = load_file(folder / "model.safetensors")
    last = f"{PATHS[-1]}.weight"
    other = tmp_path / "other.safetensors"
    for change, match, kind in (
        ({key: value for key, value in tensors.items() if key != last}, f"has no weight {last}", AdapterFileError),
        ({**tensors, last: torch.zeros(3, 4)}, rf"{last} is \(3, 4\), not \(24, 36\)", AdapterFileError),
        (
            {**tensors, last: torch.full((24, 36), torch.inf)},
            rf"original weight of {PATHS[-1]} holds a NaN",
            ValueError,
        ),
    ):
        save_file(change, other)
        refused(model, match, kind, **options(other))


def test_weights_that_others_read():
    refused(
        build("gpt2"),
        r"on lm_head: it would quantise the weight of transformer\.wte, which is the same",
        **options_of(4, target_modules=["lm_head", "wte"]),
    )
    model = pyadapt.wrap(build("llama"), LoraConfig(target_modules=["q_proj"]))
    refused(model, r"q_proj: it would quantise the weight under the adapters that are on it", **options_of(4))
    refused(
        nn.Sequential(nn.Linear(4, 3)), "rank 4 is more than", **options_of(4, target_modules=["0"], task_type=None)
    )
    refused(nn.Sequential(nn.Conv2d(4, 3, 1)), "not conv", **options_of(4, target_modules=["0"], task_type=None))


def test_two_quantisers_in_one_model(folder):
    """No configuration of transformers could say what such a checkpoint holds."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj", "lm_head"])
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    options = options_of(8, target_modules=["q_proj"])
    refused(model, "a model quantised by .*bitsandbytes.* cannot also have int8 layers; loftq_bits=4", **options)


def test_quantised_layers_with_adapters(folder):
    model = pyadapt.wrap(pyadapt.quantize(build("llama")), LoraConfig(target_modules=TARGETS))
    again = options_of(rounds=2, loftq={"original": folder})
    refused(model, "carries adapters, and loftq_iter=2 would change it under them; use 1", **again)
    model.add_adapter("new", LoraConfig(**options_of(loftq={"original": folder})))
    assert error(model, build("llama"), PATHS[0], "new")[0] < error(model, build("llama"), PATHS[0], "new")[1]


def test_not_as_plain_lora(tmp_path):
    model = wrapped(4)
    with pytest.raises(ValueError, match="fits the weights that LoftQ has quantised"):
        model.save_pretrained(tmp_path / "new", as_plain_lora=True)
    assert not (tmp_path / "new").exists()


def test_replacing_where_it_has_no_meaning(folder):
    dense = pyadapt.wrap(build("llama"), LoraConfig())
    with pytest.raises(ValueError, match="no layer with an adapter called 'default' is quantised"):
        pyadapt.replace_lora_weights_loftq(dense, folder)
    model = pyadapt.wrap(pyadapt.quantize(build("llama")), LoraConfig(r=2, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="started from its weight; LoftQ is another start"):
        pyadapt.replace_lora_weights_loftq(model, folder)
    model = pyadapt.wrap(pyadapt.quantize(build("llama")), LoraConfig(r=2))
    with pytest.raises(ValueError, match="model_path: the folder of the model from before"):
        pyadapt.replace_lora_weights_loftq(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"an adapter is merged into .*; unmerge_adapter"):
        pyadapt.replace_lora_weights_loftq(model, folder)


def test_not_merged_into_the_original_weights(folder):
    """Those lack what A and B make up for: it would count twice."""
    model = pyadapt.wrap(pyadapt.quantize(build("llama")), LoraConfig(**options_of(loftq={"original": folder})))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"merge without `original`"):
        pyadapt.merge(model, original=folder)
    assert snapshot(model) == before
    expected = logits(model)
    assert_near(logits(pyadapt.merge(model)), expected, "merged")
