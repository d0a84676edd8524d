"""Models that bitsandbytes has quantised: trained, saved and merged as peft does, more exactly where peft rounds."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_key, snapshot
from tolerance import assert_close
from torch import nn
from transformers import BitsAndBytesConfig

import pyadapt
from pyadapt import LoraConfig
from pyadapt.base import base_of
from pyadapt.trained import is_trained_state

INT8 = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE = {**NF4, "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
AS_BF16 = {**NF4, "bnb_4bit_quant_storage": torch.bfloat16}
OPTIONS = {"int8": INT8, "nf4": NF4, "double": DOUBLE, "fp4": FP4, "as_bf16": AS_BF16}
KINDS = {"int8": "bitsandbytes int8"} | dict.fromkeys(("nf4", "double", "fp4", "as_bf16"), "bitsandbytes 4-bit")


@pytest.fixture(autouse=True)
def _quiet_and_alike(monkeypatch):
    """On CPUs with AVX-512 bf16, bitsandbytes repacks 4-bit weights whose sizes fit; on others never. Here: never."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture
def quantised(tmp_path_factory):
    """A function of family, kind and dtype: the model as transformers loads it for bitsandbytes."""

    def load(name, how, dtype=torch.float32, **options):
        folder = tmp_path_factory.mktemp(name)
        dense = build(name, dtype=dtype)
        dense.save_pretrained(folder)
        if FAMILIES[name].head is not None:
            options.setdefault("llm_int8_skip_modules", [FAMILIES[name].head])
        config = BitsAndBytesConfig(**OPTIONS[how], **options)
        return type(dense).from_pretrained(folder, quantization_config=config, dtype=dtype).eval()

    return load


def is_bnb(layer):
    return isinstance(layer, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit))


def bnb_layers(model):
    return {path: layer for path, layer in model.named_modules() if is_bnb(layer)}


def exact_weight(layer):
    """W in fp64 from the tensors themselves, by bitsandbytes' definitions."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        SCB = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.detach().double() * SCB.double()[:, None] / 127
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()


def dense_twin(model, name, dtype=torch.float32):
    """The plain model with the very weights that the quantised ones stand for."""
    twin = build(name, dtype=dtype)
    for path, layer in bnb_layers(model).items():
        plain = twin.get_submodule(path)
        W = exact_weight(layer)
        with torch.no_grad():
            plain.weight.copy_(W.t() if type(plain).__name__ == "Conv1D" else W)
    return twin


def lora(name, **config):
    return {
        "r": 4,
        "lora_alpha": 8,
        "task_type": FAMILIES[name].task,
        "init_lora_weights": False,
        "target_modules": list(FAMILIES[name].targets),
        **config,
    }


def wrap(model, name, **config):
    return pyadapt.wrap(model, LoraConfig(**lora(name, **config)))


def peft_on(model, name, **config):
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        return peft.get_peft_model(model, peft.LoraConfig(**lora(name, **config)))


def assert_gradients_equal(model, twin, batch, dtype=torch.float32):
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    theirs = dict(twin.named_parameters())
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == sum(p.requires_grad for p in theirs.values())
    for name in names:
        assert_near(model.get_parameter(name).grad, theirs[peft_key(name)].grad, "gradient", dtype)


def logits(model, name):
    with torch.no_grad():
        return model(**model_batch(name)).logits


# --- what is read -----------------------------------------------------------------------------


def fresh(model, tmp_path):
    return model


def after_a_forward(model, tmp_path):
    logits(model, "llama")
    return model


def loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    return type(model).from_pretrained(tmp_path).eval()


def copied(model, tmp_path):
    return copy.deepcopy(model)


def copied_after_a_forward(model, tmp_path):
    return copy.deepcopy(after_a_forward(model, tmp_path))


def pickled(model, tmp_path):
    return pickle.loads(pickle.dumps(after_a_forward(model, tmp_path)))


def moved(model, tmp_path):
    for layer in bnb_layers(model).values():
        layer.to("cpu")
    return model


STATES = (fresh, after_a_forward, loaded, copied, copied_after_a_forward, pickled, moved)


@pytest.mark.parametrize("how", ["int8", "double", "as_bf16"])
@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_layer_is_read_and_left_alone(state, how, quantised, tmp_path):
    model = quantised("llama", how)
    expected = logits(model if state is not fresh else copy.deepcopy(model), "llama")
    model = state(quantised("llama", how), tmp_path)
    twin = wrap(dense_twin(model, "llama"), "llama")
    wrap(model, "llama")
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(model.get_parameter(name))
    # Layers without an adapter stay bitsandbytes' own, so that one layer is compared, not the logits.
    layer, exact = (m.model.layers[0].self_attn.q_proj for m in (model, twin))
    x = torch.randn(2, 3, 24)
    assert_near(layer(x), exact(x), "layer")
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), expected)
    assert_near(layer(x), exact(x), "layer")
    plain = pyadapt.unwrap(model)
    assert type(plain.model.layers[0].self_attn.q_proj) in (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    assert torch.equal(logits(plain, "llama"), expected)


@pytest.mark.parametrize("how", OPTIONS)
def test_wrapping_and_unwrapping_change_nothing(how, quantised):
    model = quantised("llama", how)
    before = snapshot(model)
    pyadapt.unwrap(wrap(model, "llama"))
    assert snapshot(model) == before


def test_a_wrapped_model_is_copied_and_pickled(quantised):
    for how in ("int8", "double"):
        model = wrap(quantised("llama", how), "llama", target_modules="all-linear").eval()
        expected = logits(model, "llama")
        assert torch.equal(logits(copy.deepcopy(model), "llama"), expected)
        assert torch.equal(logits(pickle.loads(pickle.dumps(model)), "llama"), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("shape", [(11, 7), (24, 36), (64, 128)])
def test_4_bit_sizes(shape, blocksize, quant_type):
    n, k = shape
    layer = bnb.nn.Linear4bit(k, n, quant_type=quant_type)
    layer.weight.blocksize = blocksize
    model = nn.Sequential(layer).to("cpu")
    assert layer.weight.quant_state.blocksize == blocksize
    W = exact_weight(layer)
    pyadapt.wrap(model, LoraConfig(target_modules=["0"]))
    x = torch.randn(5, k)
    assert_close(model(x), x.double() @ W.t() + layer.bias.double(), "product", torch.float32)
    assert model.get_nb_trainable_parameters()[1] == n * k + n + 8 * (n + k)


def test_weights_in_the_layout_for_cpu_inference():
    """bitsandbytes repacks 4-bit weights on some CPUs in its own forward; ours then reads what they stand for."""
    model = nn.Sequential(bnb.nn.Linear4bit(128, 64, quant_type="nf4")).to("cpu")
    layer = model[0]
    W = exact_weight(layer)
    x = torch.randn(5, 128)
    pyadapt.wrap(model, LoraConfig(target_modules=["0"]))
    exact = x.double() @ W.t() + layer.bias.double()
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    assert layer.weight.quant_state.packing_format_for_cpu
    packed = layer.weight.data.clone()
    # The layout rounds the scales to bf16.
    assert_close(model(x), exact, "layer", torch.bfloat16)
    assert torch.equal(layer.weight.data, packed)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer.weight.data, packed)
    assert layer.weight.quant_state.packing_format_for_cpu


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_gradients_equal_those_of_peft_over_the_dequantised_model(name, how, quantised):
    model = quantised(name, how).train()
    twin = peft_on(dense_twin(model, name), name, target_modules="all-linear").train()
    wrap(model, name, target_modules="all-linear")
    copy_adapter_to_peft(model, twin)
    assert_gradients_equal(model, twin, model_batch(name))


@pytest.mark.parametrize("how", OPTIONS)
def test_gradients_equal_those_of_peft_over_bitsandbytes(how, quantised):
    model, twin = quantised("llama", how).train(), peft_on(quantised("llama", how), "llama").train()
    wrap(model, "llama")
    copy_adapter_to_peft(model, twin)
    assert_gradients_equal(model, twin, model_batch("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", OPTIONS)
def test_a_layer_against_fp64(how, dtype, quantised):
    model = wrap(quantised("llama", how, dtype), "llama").train()
    layer = model.model.layers[0].self_attn.q_proj
    W, unit = exact_weight(layer), layer.adapters["default"]
    x = torch.randn(2, 3, 24, dtype=dtype, requires_grad=True)
    g = torch.randn(2, 3, 24, dtype=dtype)
    y = layer(x)
    y.backward(g)
    exact_x, A, B = (t.detach().double().requires_grad_() for t in (x, unit.lora_A, unit.lora_B))
    exact_y = exact_x @ W.t() + unit.scaling * (exact_x @ A.t()) @ B.t()
    exact_y.backward(g.double())
    assert y.dtype == dtype
    assert_close(y, exact_y, "product", dtype)
    for value, exact in ((x, exact_x), (unit.lora_A, A), (unit.lora_B, B)):
        assert_close(value.grad, exact.grad, "product", dtype)


@pytest.mark.parametrize("how", OPTIONS)
def test_nothing_of_the_size_of_the_weight_is_saved_for_backward(how):
    if how == "int8":
        layer = bnb.nn.Linear8bitLt(96, 80, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(96, 80, quant_storage=torch.bfloat16 if how == "as_bf16" else torch.uint8)
    model = pyadapt.wrap(nn.Sequential(layer).to("cpu"), LoraConfig(target_modules=["0"])).train()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = model(torch.randn(3, 96, requires_grad=True))
    assert saved
    assert max(saved) < 80 * 96 / 4
    y.sum().backward()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_inputs_are_not_rounded_to_int8(threshold, quantised):
    """bitsandbytes rounds inputs, but for outlier columns, to int8; under an adapter each column is exact."""
    model = quantised("llama", "int8", torch.bfloat16, llm_int8_threshold=threshold)
    wrap(model, "llama", init_lora_weights=True)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 9, 24, dtype=torch.bfloat16)
    x[..., 5] *= 20
    exact = x.double() @ exact_weight(layer).t()
    with torch.no_grad():
        ours, theirs = layer(x), layer.frozen(x)
    assert_close(ours, exact, "product", torch.bfloat16)
    assert (theirs - exact).norm() > 1.5 * (ours - exact).norm()


def test_several_adapters_and_a_checkpointed_step(quantised):
    model = quantised("llama", "double", torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrap(model, "llama")
    model.add_adapter("second", LoraConfig(**lora("llama", target_modules=["o_proj"])))
    model.set_adapter(["default", "second"])
    model.train()(**model_batch("llama")).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * (4 + 2)
    assert all(bool(p.grad.abs().sum() > 0) for p in trained)


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_files_are_those_of_peft(how, quantised, tmp_path):
    import peft

    model = wrap(quantised("llama", how), "llama").eval()
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(quantised("llama", how), tmp_path).eval()
    # In training mode, in which bitsandbytes does not round the input to int8.
    assert_near(one_output(model.train()), one_output(twin.base_model.model.train()), "layer")
    twin.save_pretrained(tmp_path / "theirs")
    again = pyadapt.load(quantised("llama", how), tmp_path / "theirs")
    assert torch.equal(logits(again, "llama"), logits(model.eval(), "llama"))


def one_output(model):
    torch.manual_seed(3)
    return model.model.layers[0].self_attn.q_proj(torch.randn(2, 3, 24))


# --- merging ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", OPTIONS)
def test_merged_in_place_as_by_peft_and_exactly_back(how, quantised):
    model, twin = quantised("llama", how), peft_on(quantised("llama", how), "llama").eval()
    wrap(model, "llama")
    copy_adapter_to_peft(model, twin)
    before = state_bytes(model)
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module to .-bit linear may get different")
        twin.merge_adapter()
    for path, layer in bnb_layers(model).items():
        theirs = twin.base_model.model.get_submodule(path)
        theirs = getattr(theirs, "base_layer", theirs)
        # The same codes and scales, but where a sum that is not rounded alike lies between two codes.
        assert (exact_weight(layer) == exact_weight(theirs)).double().mean() > 0.99, path
    assert state_bytes(model) != before
    # The scales of an int8 layer move from the weight to the layer in its first forward.
    merged = logits(model, "llama")
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model, "llama"), merged)
    model.unmerge_adapter()
    assert state_bytes(model) == before


def state_bytes(model):
    return {
        key: value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_merged_to_a_plain_model(name, how, dtype, quantised, tmp_path):
    model = quantised(name, how, dtype)
    twin = wrap(dense_twin(model, name), name)
    wrap(model, name)
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            if ".adapters." in key:
                parameter.copy_(model.get_parameter(key))
    logits(model, name)
    expected = pyadapt.merge(twin).state_dict()
    merged = pyadapt.merge(model)
    assert merged is model
    plain = build(name, dtype=dtype)
    assert [(path, type(m)) for path, m in merged.named_modules()] == [(p, type(m)) for p, m in plain.named_modules()]
    assert merged.state_dict().keys() == plain.state_dict().keys()
    for key, value in merged.state_dict().items():
        assert value.dtype == dtype, key
        assert_near(value, expected[key], "merged", dtype)
    for attribute in ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit", "quantization_method", "hf_quantizer"):
        assert not getattr(merged, attribute, False), attribute
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype=dtype).eval()
    assert torch.equal(logits(again, name), logits(merged, name))
    copy.deepcopy(merged).load_state_dict(plain.state_dict())


@pytest.mark.parametrize("how", ["int8", "double"])
def test_hooks_of_accelerate_stay_on_the_merged_layer(how, quantised):
    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counts.calls += 1
            return args, kwargs

    model = quantised("llama", how)
    layer = model.model.layers[0].self_attn.q_proj
    add_hook_to_module(layer, Counts())
    wrap(model, "llama").train()
    expected = layer(torch.ones(2, 24))
    merged = pyadapt.merge(model)
    assert merged.model.layers[0].self_attn.q_proj is layer
    assert_near(layer(torch.ones(2, 24)), expected, "merged")
    assert Counts.calls == 2


@pytest.mark.parametrize("how", ["int8", "double", "as_bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exported_and_from_the_original_weights(name, how, quantised, tmp_path):
    model = wrap(quantised(name, how), name)
    build(name).save_pretrained(tmp_path / "original")
    before = snapshot(model)
    report = pyadapt.export(model, tmp_path / "plain")
    assert set(report.sources.values()) == {f"dequantised {KINDS[how]} weights"}
    assert f"merged from dequantised {KINDS[how]} weights" in str(report)
    assert snapshot(model) == before
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "quantization_config" not in config
    again = type(build(name)).from_pretrained(tmp_path / "plain").eval()
    dense = wrap(build(name), name)
    with torch.no_grad():
        for key, parameter in dense.named_parameters():
            if ".adapters." in key:
                parameter.copy_(model.get_parameter(key))
    original = pyadapt.export(model, tmp_path / "exact", original=tmp_path / "original")
    assert set(original.sources.values()) == {"original weights"}
    exact = type(build(name)).from_pretrained(tmp_path / "exact").eval()
    expected = pyadapt.merge(dense).state_dict()
    for key, value in exact.state_dict().items():
        assert_near(value, expected[key], "merged")
    merged = pyadapt.merge(model).state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, merged[key])


@pytest.mark.parametrize("how", ["int8", "nf4", "double", "fp4"])
def test_the_estimate_is_near_the_true_error(how):
    torch.manual_seed(0)
    W = torch.randn(192, 256)
    if how == "int8":
        layer = bnb.nn.Linear8bitLt(256, 192, has_fp16_weights=False)
    else:
        quant_type = OPTIONS[how]["bnb_4bit_quant_type"]
        layer = bnb.nn.Linear4bit(256, 192, compress_statistics=how == "double", quant_type=quant_type)
    layer.weight.data = W.clone()
    model = nn.Sequential(layer).to("cpu")
    true = float((exact_weight(layer) - W).norm() / W.norm())
    assert base_of(model[0]).quantization_error(layer) == pytest.approx(true, rel=0.15)


# --- reports and refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("how", OPTIONS)
def test_plan_and_counts(how, quantised):
    model, dense = quantised("llama", how), build("llama")
    plan, exact = (pyadapt.plan(m, LoraConfig(**lora("llama"))) for m in (model, dense))
    assert {row.base for row in plan.layers} == {KINDS[how]}
    assert KINDS[how] in str(plan)
    assert "reference" not in {row.kernel for row in plan.layers} or exact.layers[0].kernel == "reference"
    assert plan.base_parameters == exact.base_parameters
    wrap(model, "llama")
    assert model.get_nb_trainable_parameters() == (exact.trainable_parameters, exact.all_parameters)
    assert [row.path for row in plan.layers] == [row.path for row in exact.layers]


def test_the_head_stays_dense_and_can_be_trained(quantised):
    model = quantised("llama", "int8", llm_int8_skip_modules=["lm_head", "o_proj"])
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    plan = pyadapt.plan(model, LoraConfig(target_modules="all-linear"))
    assert {row.base for row in plan.layers if row.path.endswith("o_proj")} == {"dense"}
    wrap(model, "llama", modules_to_save=["lm_head"])
    assert type(model.lm_head.copies["default"]) is nn.Linear


@pytest.mark.parametrize("how", ["int8", "as_bf16"])
def test_a_quantised_module_cannot_be_trained_whole(how, quantised):
    model = quantised("llama", how)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"o_proj' is quantised \(bitsandbytes .*llm_int8_skip_modules"):
        wrap(model, "llama", modules_to_save=["o_proj"])
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (lambda: bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False), "0 .Linear8bitLt.: .*not quantised yet; move it"),
        (lambda: bnb.nn.Linear4bit(8, 8), "0 .Linear4bit.: .*not quantised yet; move it"),
        (lambda: bnb.nn.Linear8bitLt(8, 8), "llm_int8_has_fp16_weight=False"),
    ],
)
def test_layers_that_are_not_quantised_are_refused(layer, match):
    model = nn.Sequential(layer())
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        pyadapt.wrap(model, LoraConfig(target_modules=["0"]))
    assert snapshot(model) == before


def test_bitsandbytes_is_not_imported_for_the_question():
    code = """
import sys, torch, pyadapt
model = pyadapt.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), pyadapt.LoraConfig(target_modules=["0"]))
pyadapt.merge(model)
assert "bitsandbytes" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


# --- with the rest of pyadapt ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["int8", "double"])
def test_dora_trains_as_in_peft_over_the_dequantised_model(how, quantised):
    model = quantised("llama", how).train()
    twin = peft_on(dense_twin(model, "llama"), "llama", target_modules="all-linear", use_dora=True).train()
    wrap(model, "llama", target_modules="all-linear", use_dora=True)
    copy_adapter_to_peft(model, twin)
    model(**model_batch("llama")).loss.backward()
    twin(**model_batch("llama")).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert len(ours) == len(theirs)
    for name, gradient in ours.items():
        if not name.endswith("lora_magnitude_vector"):
            assert_near(gradient, theirs[peft_key(name)], "gradient")


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("how", ["int8", "double"])
def test_an_adapter_that_starts_from_the_weight_changes_nothing_at_first(how, init, quantised):
    model = wrap(quantised("llama", how), "llama", init_lora_weights=init)
    layer = model.model.layers[0].self_attn.q_proj
    assert bool(layer.adapters["default"].lora_B.abs().sum() > 0)
    x = torch.randn(2, 3, 24)
    assert_close(layer(x), x.double() @ exact_weight(layer).t(), "layer", torch.float32)


@pytest.mark.parametrize("how", ["int8", "double"])
def test_a_layer_compiles_whole(how, quantised):
    model = wrap(quantised("llama", how), "llama").train()
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 24, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_near(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected, "gradient")


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_trainer_takes_the_model_and_saves_the_adapter(how, quantised, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = wrap(quantised("llama", how), "llama", init_lora_weights=True)
    batch = model_batch("llama", rows=4)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert is_trained_state(str(tmp_path / "checkpoint-2" / "model.safetensors"))
    again = pyadapt.load(quantised("llama", how), tmp_path / "checkpoint-2")
    assert torch.equal(logits(again, "llama"), logits(model.eval(), "llama"))


@pytest.mark.parametrize("how", ["int8", "double"])
def test_rows_of_a_batch_with_adapters_of_their_own(how, quantised):
    model = wrap(quantised("llama", how), "llama", target_modules="all-linear")
    model.add_adapter("second", LoraConfig(**lora("llama", target_modules="all-linear")))
    model.train()
    batch = model_batch("llama", rows=3)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["second", "__base__", "default"]).logits
        for row, name in ((0, "second"), (2, "default")):
            model.set_adapter(name)
            assert_near(mixed[row], model(**batch).logits[row], "model")
        with model.disable_adapter():
            assert_near(mixed[1], model(**batch).logits[1], "model")
    assert model.get_model_status().quantization_backend == KINDS[how]
