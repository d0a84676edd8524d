"""Training a wrapped model: losses and gradients are those of peft with the same adapter to begin with."""

from __future__ import annotations

import pytest
import torch
from models import ALL, FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_key, peft_twin
from torch import nn

import pyadapt
from pyadapt import LoraConfig

STEPS = 6


def wrapped_and_twin(name, model=None, base_of_twin=None, **config):
    """Our wrapped model and peft's, with the same weights everywhere, in training mode."""
    model = build(name) if model is None else model
    config = {"r": 4, "lora_alpha": 8, "task_type": FAMILIES[name].task, "init_lora_weights": False, **config}
    targets = config.pop("target_modules", list(FAMILIES[name].targets))
    twin = peft_twin(model if base_of_twin is None else base_of_twin, target_modules=targets, **config)
    pyadapt.wrap(model, LoraConfig(target_modules=targets, **config))
    copy_adapter_to_peft(model, twin)
    return model.train(), twin.train()


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model, batches, lr=1e-2):
    """The loss before each step of AdamW."""
    optimizer = torch.optim.AdamW(trained(model), lr=lr)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def gradients(model, batch, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal_those_of_peft(model, twin, batch):
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    theirs = dict(twin.named_parameters())
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_near(parameter.grad, theirs[peft_key(name)].grad, "gradient")
            count += 1
        else:
            assert parameter.grad is None, name
    assert count == sum(p.requires_grad for p in theirs.values())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("targets", ["default", "all-linear"])
def test_gradients_equal_those_of_peft(name, targets):
    model, twin = wrapped_and_twin(name, **({} if targets == "default" else {"target_modules": targets}))
    assert_gradients_equal_those_of_peft(model, twin, model_batch(name))


@pytest.mark.parametrize("name", ALL)
def test_losses_equal_those_of_peft_step_by_step(name):
    model, twin = wrapped_and_twin(name)
    batches = [model_batch(name, seed) for seed in range(STEPS)]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    ours, theirs = train(model, batches), train(twin, batches)
    assert_near(ours, theirs, "loss")
    assert ours[0] != ours[1]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_a_fresh_adapter_learns():
    model = pyadapt.wrap(build("llama"), LoraConfig(r=8, target_modules="all-linear")).train()
    losses = train(model, [model_batch("llama")] * 20, lr=3e-2)
    assert losses[-1] < 0.9 * losses[0]


def test_patterns_and_rslora_train_as_in_peft():
    config = {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    model, twin = wrapped_and_twin("llama", **config)
    assert_gradients_equal_those_of_peft(model, twin, model_batch("llama"))


def test_two_adapters_at_once_train_as_in_peft():
    import peft

    model, twin = wrapped_and_twin("llama")
    extra = {"r": 2, "target_modules": ["v_proj", "up_proj"], "init_lora_weights": False}
    model.add_adapter("extra", LoraConfig(**extra))
    twin.add_adapter("extra", peft.LoraConfig(**extra))
    copy_adapter_to_peft(model, twin, "extra")
    model.set_adapter(["default", "extra"])
    twin.base_model.set_adapter(["default", "extra"])
    assert_gradients_equal_those_of_peft(model, twin, model_batch("llama"))


# --- int8 -------------------------------------------------------------------------------------


def dequantised(name):
    """The family's model with int8 weights, and the dense model that holds the very values they stand for."""
    from pyadapt.base import base_of

    model, dense = pyadapt.quantize(build(name)), build(name)
    for path, layer in model.named_modules():
        kind = base_of(layer)
        if kind is not None and kind.name == "int8":
            q, scale, _ = kind.operands(layer)
            twin = dense.get_submodule(path)
            matrix = q.float() * scale[:, None]
            with torch.no_grad():
                twin.weight.copy_(matrix.t() if type(twin).__name__ == "Conv1D" else matrix)
    return model, dense


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_int8_base_trains_as_peft_over_the_dequantised_one(name):
    quantised, dense = dequantised(name)
    model, twin = wrapped_and_twin(name, model=quantised, base_of_twin=dense)
    assert_gradients_equal_those_of_peft(model, twin, model_batch(name))
    model.zero_grad()
    twin.zero_grad()
    batches = [model_batch(name, seed) for seed in range(STEPS)]
    assert_near(train(model, batches), train(twin, batches), "loss")


# --- activation checkpointing -----------------------------------------------------------------


@pytest.mark.parametrize("when", ["before wrap", "after wrap"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2"])
@pytest.mark.parametrize("base", ["dense", "int8"])
def test_checkpointing_with_dropout_gives_the_same_gradients(name, reentrant, when, base):
    """The recomputed forward draws the same masks; with checkpointing on before wrap, inputs still get gradients."""

    def make():
        model = build(name) if base == "dense" else pyadapt.quantize(build(name))
        return model

    config = LoraConfig(
        target_modules=list(FAMILIES[name].targets),
        lora_dropout=0.3,
        init_lora_weights=False,
        task_type=FAMILIES[name].task,
    )
    batch = model_batch(name)

    def wrap(model):
        torch.manual_seed(5)
        return pyadapt.wrap(model, config).train()

    plain = gradients(wrap(make()), batch)
    model = make()
    options = {"use_reentrant": reentrant}
    if when == "before wrap":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        wrap(model)
    else:
        wrap(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    checkpointed = gradients(model, batch)
    assert checkpointed.keys() == plain.keys()
    for key, value in plain.items():
        assert value.any() or "copies" in key, key
        assert_near(checkpointed[key], value, "gradient")


def test_checkpointing_enabled_after_wrap_needs_no_second_call():
    """transformers' own enable call asks `_hf_peft_config_loaded` and makes the inputs require gradients."""
    model = pyadapt.wrap(build("llama"), LoraConfig(init_lora_weights=False)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    found = gradients(model, model_batch("llama"))
    assert len(found) == 8


# --- dropout ----------------------------------------------------------------------------------


def test_dropout_is_on_in_training_only_and_follows_the_seed():
    model = pyadapt.wrap(build("llama"), LoraConfig(lora_dropout=0.5, init_lora_weights=False))
    batch = model_batch("llama")
    still = model(**batch).logits
    assert torch.equal(model(**batch).logits, still)
    model.train()
    torch.manual_seed(7)
    one = model(**batch).logits
    two = model(**batch).logits
    torch.manual_seed(7)
    assert torch.equal(model(**batch).logits, one)
    assert not torch.equal(two, one)
    assert not torch.equal(one, still)


def test_dropout_keeps_the_mean():
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    pyadapt.wrap(model, LoraConfig(r=2, lora_dropout=0.4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(1, 8).expand(40_000, 8)
    expected = model.eval()(x[:1]).detach()
    with torch.no_grad():
        mean = model.train()(x).mean(0, keepdim=True)
        spread = model(x).std(0, keepdim=True) / 40_000**0.5
    assert bool(((mean - expected).abs() < 6 * spread + 1e-6).all())


# --- autocast and 16 bits ---------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base):
    model, twin = wrapped_and_twin("llama", model=build("llama", dtype=base))
    batches = [model_batch("llama", seed) for seed in range(STEPS)]
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(**batches[0]), twin(**batches[0])
        assert out.logits.dtype == expected.logits.dtype
        assert_near(out.logits, expected.logits, "model", torch.bfloat16)
        assert_near(train(model, batches), train(twin, batches), "loss", torch.bfloat16)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in trained(model))


def test_bf16_base_without_autocast():
    model, twin = wrapped_and_twin("llama", model=build("llama", dtype=torch.bfloat16))
    batch = model_batch("llama")
    out, expected = model(**batch), twin(**batch)
    assert out.logits.dtype == torch.bfloat16
    assert_near(out.logits, expected.logits, "model")
    out.loss.backward()
    assert {p.grad.dtype for p in trained(model)} == {torch.float32}


def test_gradient_accumulates_and_the_input_gets_one():
    model = nn.Sequential(nn.Linear(6, 5))
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 6, requires_grad=True)
    model(x).sum().backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    dx = x.grad.clone()
    model(x).sum().backward()
    for name, grad in once.items():
        assert_near(model.get_parameter(name).grad, 2 * grad, "layer")
    assert_near(x.grad, 2 * dx, "layer")


@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 7), (2, 3, 7), (2, 0, 7), (2, 1, 3, 7)])
def test_any_leading_dimensions(shape):
    model = nn.Sequential(nn.Linear(7, 3)).double()
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    unit = model[0].adapters["default"]
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = model(x)
    expected = x @ (model[0].weight + unit.scaling * unit.lora_B @ unit.lora_A).t() + model[0].bias
    assert_near(y, expected, "layer")
    (y**2).sum().backward()
    assert x.grad.shape == x.shape


def test_gradcheck_in_fp64():
    model = nn.Sequential(nn.Linear(5, 4)).double()
    pyadapt.wrap(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    unit = model[0].adapters["default"]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(x, A, B):
        return torch.func.functional_call(model, {"0.adapters.default.lora_A": A, "0.adapters.default.lora_B": B}, (x,))

    assert torch.autograd.gradcheck(function, (x, unit.lora_A, unit.lora_B))


def test_non_contiguous_input():
    model = nn.Sequential(nn.Linear(6, 5))
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(6, 4).t()
    assert not x.is_contiguous()
    assert_near(model(x), model(x.contiguous()), "layer")
    assert_near(model(x[:, ::1][::2]), model(x.contiguous()[::2].contiguous()), "layer")
