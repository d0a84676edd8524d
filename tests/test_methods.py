"""What holds of every method that adapts single layers, on every kind of base: one matrix, LoRA beside the others.

What is particular to a method, and its agreement with peft step by step, is in its own test file.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from models import FAMILIES, assert_near, build, model_batch, snapshot
from torch import nn

import pyadapt
from pyadapt.config import as_config
from pyadapt.ops import routes

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "lora": {"peft_type": "LORA", "r": 3},
    "adalora": {"peft_type": "ADALORA", "init_r": 3, "target_r": 2, "total_step": 100, "orth_reg_weight": 0.0},
    "ia3": {"peft_type": "IA3"},
    "loha": {"peft_type": "LOHA", "r": 2},
    "lokr": {"peft_type": "LOKR", "r": 2},
}
EVERY = pytest.mark.parametrize("method", CONFIGS)
FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "vit"])


def config_of(method, family="llama", **options):
    """A configuration that adapts every linear layer inside the blocks; the last of each block on its input side."""
    targets = {
        "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "gpt2": ["c_attn", "mlp.c_proj"],
        "t5": ["q", "v", "wi_0", "wo"],
        "bert": ["query", "value", "intermediate.dense", "output.dense"],
        "vit": ["q_proj", "v_proj", "fc1", "fc2"],
    }[family]
    if method == "ia3":
        options["feedforward_modules"] = targets[-1:]
    values = {**CONFIGS[method], "target_modules": targets, "task_type": FAMILIES[family].task, **options}
    return as_config(values)


def wrapped(method, family="llama", dtype=torch.float32, prepare=None, **options):
    """A wrapped tiny model whose adapter does something."""
    model = build(family, dtype=dtype)
    model = model if prepare is None else prepare(model)
    model = pyadapt.wrap(model, config_of(method, family, **options))
    stir(model)
    return model


def stir(model, seed=0):
    """Move every trained weight of an adapter away from where it does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(parameter.dtype))


def output(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def step(model, batch):
    """The loss and the adapter's gradients."""
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@EVERY
@FAMILY
def test_a_life(method, family, tmp_path):
    """Trained, saved, loaded, disabled, merged, unmerged and unwrapped."""
    base = build(family)
    before, batch = copy.deepcopy(base.state_dict()), model_batch(family)
    untouched = output(base, batch)
    model = pyadapt.wrap(base, config_of(method, family)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        losses.append(step(model, batch)[0])
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    adapted = output(model, batch)
    assert not torch.equal(adapted, untouched)
    model.save_pretrained(tmp_path)
    loaded = pyadapt.load(build(family), tmp_path).eval()
    assert torch.equal(output(loaded, batch), adapted)
    with model.disable_adapter():
        assert torch.equal(output(model, batch), untouched)
    model.merge_adapter()
    assert_near(output(model, batch), adapted, "merged")
    model.unmerge_adapter()
    assert torch.equal(output(model, batch), adapted)
    plain = loaded.merge_and_unload()
    assert type(plain) is type(build(family))
    assert_near(output(plain, batch), adapted, "merged")
    unwrapped = pyadapt.unwrap(model)
    assert all(torch.equal(unwrapped.state_dict()[key], value) for key, value in before.items())


def bitsandbytes(folder, **options):
    """A function that saves a dense model and loads it as bitsandbytes quantises it."""
    from transformers import BitsAndBytesConfig

    def load(model):
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options)).eval()

    return load


def quantized(model):
    return pyadapt.quantize(model)


@EVERY
@pytest.mark.parametrize("kind", ["int8", "bitsandbytes int8", "bitsandbytes 4-bit"])
def test_quantised_bases_train_and_merge(method, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    prepare = {
        "int8": quantized,
        "bitsandbytes int8": bitsandbytes(tmp_path, load_in_8bit=True),
        "bitsandbytes 4-bit": bitsandbytes(tmp_path, load_in_4bit=True),
    }[kind]
    # Every layer: bitsandbytes' own forward rounds activations, which the merged model does not.
    model = wrapped(method, prepare=prepare, target_modules=EVERY_LINEAR)
    batch = model_batch("llama")
    loss, found = step(model.train(), batch)
    assert loss.isfinite()
    assert found
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in found.values())
    adapted = output(model.eval(), batch)
    plain = model.merge_and_unload()
    assert all(parameter.is_floating_point() for parameter in plain.parameters())
    assert_near(output(plain, batch), adapted, "merged")


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_the_base(method, dtype):
    """The same adapter over the same weights gives the fp64 model's output, to that dtype."""
    model = wrapped(method, dtype=dtype)
    wide = wrapped(method, prepare=lambda _: build("llama", dtype=dtype).double())
    values = pyadapt.get_peft_model_state_dict(model)
    pyadapt.set_peft_model_state_dict(wide, values)
    batch = model_batch("llama")
    _, found = step(model, batch)
    assert all(gradient.isfinite().all() for gradient in found.values())
    # The table has no row for a model in fp16: its rounding is finer than bf16's.
    coarsest = torch.bfloat16 if dtype == torch.float16 else dtype
    assert_near(output(model, batch), output(wide, batch), "model", coarsest)


@EVERY
@pytest.mark.slow
@pytest.mark.parametrize("prepare", [None, quantized], ids=["dense", "int8"])
def test_compiled_whole(method, prepare):
    model = wrapped(method, prepare=prepare).train()
    eager = copy.deepcopy(model)
    batch = model_batch("llama")
    loss, found = step(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    expected_loss, expected = step(eager, batch)
    assert_near(loss, expected_loss, "loss")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(found[name], gradient, "gradient")


@EVERY
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(method, use_reentrant):
    model = wrapped(method).train()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again.enable_input_require_grads()
    batch = model_batch("llama")
    loss, found = step(model, batch)
    loss_again, found_again = step(again, batch)
    assert torch.equal(loss, loss_again)
    assert found.keys() == found_again.keys()
    assert all(torch.equal(found[name], found_again[name]) for name in found)


@EVERY
def test_autocast(method):
    model, batch = wrapped(method).train(), model_batch("llama")
    exact, gradients = step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = step(model, batch)
    assert_near(loss, exact, "loss", torch.bfloat16)
    assert found.keys() == gradients.keys()
    assert all(found[name].dtype == torch.float32 and found[name].isfinite().all() for name in found)


@EVERY
@pytest.mark.parametrize("route", ["fused", "library", "reference"])
@pytest.mark.parametrize("prepare", [None, quantized], ids=["dense", "int8"])
def test_what_follows_may_change_the_output_in_place(method, route, prepare):
    """As it may behind a plain linear layer; torch forbids it where a Function hands out a view."""

    def gradients(in_place):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(in_place), nn.Linear(6, 5)).bfloat16()
        model = model if prepare is None else prepare(model)
        model = pyadapt.wrap(model, as_config({**CONFIGS[method], "target_modules": ["0"], **extra}))
        stir(model)
        x = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
        with routes.forced(route):
            model(x).sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    extra = {"feedforward_modules": []} if method == "ia3" else {}
    found, expected = gradients(True), gradients(False)
    assert len(found) == len(expected) > 1
    for value, exact in zip(found, expected, strict=True):
        assert_near(value, exact, "gradient", torch.bfloat16)


@EVERY
def test_a_batch_with_an_adapter_for_each_row(method):
    model = wrapped(method)
    model.add_adapter("second", config_of(method))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters.second." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    batch = model_batch("llama", rows=3)
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = output(model, batch)[row]
        else:
            model.set_adapter(name)
            alone = output(model, batch)[row]
        assert_near(mixed[row], alone, "model")


@EVERY
def test_two_adapters_of_one_method_at_work_are_both_in_the_merged_weights(method):
    model = wrapped(method)
    model.add_adapter("second", config_of(method))
    stir(model, seed=1)
    model.set_adapter(["default", "second"])
    batch = model_batch("llama")
    both = output(model, batch)
    model.set_adapter("second")
    assert not torch.equal(output(model, batch), both)
    model.set_adapter(["default", "second"])
    model.merge_adapter()
    assert_near(output(model, batch), both, "merged")


@EVERY
@pytest.mark.parametrize("second", CONFIGS)
def test_two_methods_on_one_layer(method, second):
    """Terms add up, and are all in the merged weights; IA3 multiplies, and is refused beside another method."""
    model = wrapped(method)
    model.add_adapter("second", config_of(second))
    stir(model, seed=1)
    if (method == "ia3") != (second == "ia3"):
        with pytest.raises(ValueError, match="cannot be at work together"):
            model.set_adapter(["default", "second"])
        return
    model.set_adapter(["default", "second"])
    both = output(model, model_batch("llama"))
    assert_near(output(model.merge_and_unload(), model_batch("llama")), both, "merged")


@pytest.mark.parametrize("method", [name for name in CONFIGS if name not in ("lora", "ia3")])
def test_dora_stays_alone(method):
    model = wrapped("lora", use_dora=True)
    model.add_adapter("second", config_of(method))
    with pytest.raises(ValueError, match=r"norm of 'default', a DoRA.*'second', which is no LoRA"):
        model.set_adapter(["default", "second"])


@EVERY
def test_a_plan_is_what_wrapping_does(method):
    plan = pyadapt.plan(build("llama"), config_of(method))
    model = pyadapt.wrap(build("llama"), config_of(method))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert plan.trainable_parameters == trained
    assert {row.path for row in plan.layers} == {
        path for path, layer in model.named_modules() if hasattr(layer, "base")
    }
    assert all(row.kernel for row in plan.layers)


@pytest.mark.parametrize("method", [name for name in CONFIGS if name != "lora"])
def test_embeddings_are_for_lora(method):
    with pytest.raises(ValueError, match=r"model\.embed_tokens \(Embedding\): .*embedding"):
        pyadapt.wrap(build("llama"), config_of(method, target_modules=["embed_tokens", "down_proj"]))


@EVERY
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, "q_prj.*nearest are.*q_proj"),
        ({"target_modules": "(("}, "no regular expression"),
        ({"target_modules": ["mlp"]}, "which no adapter can be put on"),
        ({"modules_to_save": ["hed"]}, "hed"),
        ({"no_such_option": 1}, "no key 'no_such_option'"),
        ({"exclude_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}, "leaves none of them"),
    ],
    ids=str,
)
def test_bad_input_changes_nothing(method, options, message):
    model = build("llama")
    before = snapshot(model)
    values = {**CONFIGS[method], "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **options}
    if method == "ia3":
        values["feedforward_modules"] = []
    with pytest.raises(ValueError, match=message):
        pyadapt.wrap(model, values)
    assert snapshot(model) == before
