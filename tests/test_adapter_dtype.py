"""The dtype that an adapter's weights are held and trained in (`adapter_dtype`)."""

from __future__ import annotations

import peft
import pytest
import torch
from models import assert_near, build, copy_adapter_to_peft, model_batch, peft_twin, plain_module, snapshot
from peft_gradients import assert_gradients_equal, our_gradients
from safetensors.torch import load_file
from tolerance import coarsest

import pyadapt
from pyadapt import LoraConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
BASES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}


def layer_of(base, adapter_dtype, **options):
    """One adapted layer over a base, with all weights of the adapter random."""
    model = plain_module()
    if base == "int8":
        pyadapt.quantize(model, skip=["classifier"])
    model = model.to(BASES[base])
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, r=4, adapter_dtype=adapter_dtype, **options)
    pyadapt.wrap(model, config)
    return model, model.encoder[0], model.encoder[0].adapters["default"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapter_dtype", [*DTYPES, "base", None])
@pytest.mark.parametrize("use_dora", [False, True])
def test_forward_and_gradients(base, adapter_dtype, use_dora):
    """Against fp64 mathematics on the values as they are stored."""
    _, layer, unit = layer_of(base, adapter_dtype, use_dora=use_dora)
    wanted = BASES[base] if adapter_dtype == "base" else DTYPES[adapter_dtype or "float32"]
    assert {parameter.dtype for parameter in unit.parameters()} == {wanted}
    x = torch.randn(5, 7).to(BASES[base]).requires_grad_()
    g = torch.randn(5, 11).to(BASES[base])
    y = layer(x)
    assert y.dtype == x.dtype
    y.backward(g)

    exact_x = x.detach().double().requires_grad_()
    exact = {name: value.detach().double().requires_grad_() for name, value in unit.named_parameters()}
    W = layer.base.matrix(layer).double()
    moved = W + unit.scaling * exact["lora_B"] @ exact["lora_A"]
    if use_dora:
        moved = (exact["lora_magnitude_vector"] / moved.detach().norm(dim=1))[:, None] * moved
    exact_y = exact_x @ moved.t() + layer.bias.detach().double()
    exact_y.backward(g.double())
    # Products are summed in fp32 whatever the adapter is held in; only what is stored in its dtype is rounded to it.
    assert_near(y, exact_y, "layer", x.dtype)
    for name, parameter in unit.named_parameters():
        assert parameter.grad.dtype == wanted
        assert_near(parameter.grad, exact[name].grad, "product", coarsest(x.dtype, wanted))
    assert x.grad.dtype == x.dtype
    assert_near(x.grad, exact_x.grad, "gradient", x.dtype)


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float16"])
def test_a_training_step(adapter_dtype):
    model = build("llama", dtype=torch.bfloat16)
    pyadapt.wrap(model, LoraConfig(adapter_dtype=adapter_dtype, init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = model(**model_batch("llama")).loss
    before.backward()
    assert {gradient.dtype for gradient in our_gradients(model).values()} == {DTYPES[adapter_dtype]}
    optimizer.step()
    assert model(**model_batch("llama")).loss < before


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_like_the_base_as_peft_without_autocast(base):
    """peft keeps an adapter in the dtype of its layer where `autocast_adapter_dtype=False`."""
    plain = build("bert", dtype=BASES[base])
    options = {"task_type": "FEATURE_EXTRACTION", "init_lora_weights": False, "target_modules": ["query", "value"]}
    twin = peft_twin(plain, **options)
    model = pyadapt.wrap(plain, LoraConfig(**options, adapter_dtype="base"))
    twin.to(BASES[base])
    copy_adapter_to_peft(model, twin)
    batch = model_batch("bert")
    ours, theirs = model(**batch), twin.base_model(**batch)
    assert_near(ours.logits, theirs.logits, "model")
    ours.loss.backward()
    theirs.loss.backward()
    assert_gradients_equal(model, twin)


@pytest.mark.parametrize("adapter_dtype", DTYPES)
def test_files_keep_the_dtype(adapter_dtype, tmp_path):
    model, _, unit = layer_of("fp32", adapter_dtype)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {DTYPES[adapter_dtype]}
    assert "adapter_dtype" not in (tmp_path / "adapter_config.json").read_text()
    x = torch.randn(3, 7)
    expected = model(x)
    # Loaded in float32 by default, as peft does; what was stored is held exactly.
    loaded = pyadapt.load(plain_module(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain_module(), tmp_path)
    again = loaded.encoder[0].adapters["default"]
    of_peft = theirs.base_model.model.encoder[0].lora_A["default"].weight
    assert again.lora_A.dtype == torch.float32 == of_peft.dtype
    assert torch.equal(again.lora_A, of_peft)
    assert_near(loaded(x), expected, "model", DTYPES[adapter_dtype] if adapter_dtype == "bfloat16" else torch.float32)
    # Or as asked.
    as_asked = pyadapt.load(plain_module(), tmp_path, adapter_dtype=adapter_dtype)
    assert torch.equal(as_asked.encoder[0].adapters["default"].lora_A, unit.lora_A)
    assert torch.equal(as_asked(x), expected)
    as_asked.load_adapter(tmp_path, "second", adapter_dtype=DTYPES[adapter_dtype])
    assert as_asked.encoder[0].adapters["second"].lora_A.dtype == DTYPES[adapter_dtype]


def test_several_adapters_of_different_dtypes():
    model, layer, unit = layer_of("fp32", "bfloat16")
    model.add_adapter("second", LoraConfig(target_modules=["0"], init_lora_weights=False, adapter_dtype="float16"))
    model.set_adapter(["default", "second"])
    second = layer.adapters["second"]
    x = torch.randn(3, 7)
    moved = layer.weight.double() + sum(u.scaling * u.lora_B.double() @ u.lora_A.double() for u in (unit, second))
    assert_near(layer(x), x.double() @ moved.t() + layer.bias.double(), "layer", torch.bfloat16)


def test_merging_a_16_bit_adapter():
    model, layer, unit = layer_of("fp32", "bfloat16")
    exact = layer.weight.double() + unit.scaling * unit.lora_B.double() @ unit.lora_A.double()
    pyadapt.merge(model)
    assert_near(layer.weight, exact, "merged", torch.float32)


def test_bad_values():
    before = snapshot(model := plain_module())
    for value in ("int8", "half", torch.int8, 16):
        with pytest.raises((ValueError, TypeError), match="adapter_dtype"):
            pyadapt.wrap(model, LoraConfig(target_modules=["0"], adapter_dtype=value))
    assert snapshot(model) == before
