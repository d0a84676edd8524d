"""LoHa on linear layers: the starts, losses, gradients and files of peft; the merged layer where peft has none."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, snapshot
from safetensors.torch import load_file
from tolerance import assert_close
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import pyadapt
from pyadapt import AdapterConfig, LoHaConfig, LoraConfig
from pyadapt.methods.lycoris import loha_linear

# Those that peft can adapt: all but GPT-2, whose Conv1D it refuses.
OF_PEFT = [name for name in FAMILIES if name != "gpt2"]
STEPS = 4
FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@pytest.fixture(params=["khatri-rao", "tiled"])
def form(request, monkeypatch):
    """Tiny layers would choose the tiled form, if they had rows enough: each test says which one."""
    monkeypatch.setattr(loha_linear, "is_tiled", lambda *case: request.param == "tiled")
    return request.param


def options(name, **config):
    task, targets = FAMILIES[name].task, list(FAMILIES[name].targets)
    return {"r": 3, "alpha": 5, "task_type": task, "target_modules": targets, "init_weights": False, **config}


def wrap(name, model=None, **config):
    return pyadapt.wrap(build(name) if model is None else model, LoHaConfig(**options(name, **config)))


def pair(name, model=None, base=None, **config):
    """Our wrapped model and peft's, with the same values, in training mode."""
    base = copy.deepcopy(build(name) if model is None else model) if base is None else base
    model = wrap(name, model, **config)
    twin = peft.get_peft_model(base, peft.LoHaConfig(**options(name, **config)))
    copy_adapter_to_peft(model, twin)
    return model.train(), twin.train()


def of_peft(own_name):
    """`...adapters.<name>.hada_w1_a` -> `...hada_w1_a.<name>`."""
    path, adapters, rest = own_name.partition(".adapters.")
    if adapters:
        name, _, factor = rest.partition(".")
        return f"base_model.model.{path}.{factor}.{name}"
    path, _, rest = own_name.partition(".copies.")
    return f"base_model.model.{path}.modules_to_save.{rest}"


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, name):
    """The loss before each step of AdamW."""
    optimizer, losses = torch.optim.AdamW(trained(model).values(), lr=1e-2), []
    for seed in range(STEPS):
        loss = model(**model_batch(name, seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_gradients_are_those_of_peft(model, twin, name, dtype=torch.float32):
    model(**model_batch(name)).loss.backward()
    twin(**model_batch(name)).loss.backward()
    theirs = trained(twin)
    assert len(theirs) == len(trained(model)) > 0
    for key, parameter in trained(model).items():
        assert_near(parameter.grad, theirs[of_peft(key)].grad, "gradient", dtype)


def logits(model, name="llama"):
    with torch.no_grad():
        return model(**model_batch(name)).logits


def delta(layer, name="default"):
    """dW in fp64 by the definition."""
    unit = layer.unit(name)
    w1a, w1b, w2a, w2b = (getattr(unit, factor).detach().double() for factor in FACTORS)
    return unit.scaling * (w1a @ w1b) * (w2a @ w2b)


# --- configuration ----------------------------------------------------------------------------


def test_defaults_are_those_of_peft():
    theirs, ours = peft.LoHaConfig().to_dict(), LoHaConfig().to_dict()
    theirs["peft_type"] = theirs["peft_type"].value
    assert ours == theirs
    values = {"r": 3, "alpha": 2, "rank_dropout": 0.1, "rank_pattern": {"q_proj": 4}, "target_modules": {"v", "q"}}
    assert AdapterConfig.from_peft(peft.LoHaConfig(**values)) == LoHaConfig(**values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"r": 0}, "r=0: a rank is a whole number of at least 1"),
        ({"rank_dropout": 1.0}, r"rank_dropout=1.0 is not in \[0, 1\)"),
        ({"module_dropout": -0.1}, r"module_dropout=-0.1 is not in \[0, 1\)"),
        ({"init_weights": "kaiming"}, "init_weights='kaiming': LoHa knows True"),
        ({"lora_alpha": 3}, "LoHaConfig has no key 'lora_alpha'; did you mean 'alpha'"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
    ],
)
def test_bad_values(values, match):
    with pytest.raises(ValueError, match=match):
        AdapterConfig.from_dict({"peft_type": "LOHA", **values})


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj'; the nearest are"),
        ({"rank_pattern": {"nowhere": 2}}, "rank_pattern 'nowhere' matches none"),
        ({"target_modules": ["embed_tokens"]}, "LoHa cannot adapt embedding layers, only conv and linear ones"),
    ],
)
def test_what_does_not_fit_the_model(config, match):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        wrap("llama", model, **config)
    assert snapshot(model) == before


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_same_seed_gives_the_start_of_peft(name, init_weights):
    torch.manual_seed(3)
    twin = peft.get_peft_model(build(name), peft.LoHaConfig(**options(name, init_weights=init_weights)))
    torch.manual_seed(3)
    model = wrap(name, init_weights=init_weights)
    theirs = peft.get_peft_model_state_dict(twin)
    for key, value in model.get_adapter_state_dict().items():
        assert torch.equal(value, theirs[f"base_model.model.{key}"]), key
    assert torch.equal(logits(model, name), logits(build(name), name)) is init_weights


@pytest.mark.parametrize("name", OF_PEFT)
@pytest.mark.parametrize("targets", ["default", "all-linear"])
def test_gradients_are_those_of_peft(name, targets, form):
    config = {} if targets == "default" else {"target_modules": targets}
    assert_gradients_are_those_of_peft(*pair(name, **config), name)


@pytest.mark.parametrize("name", OF_PEFT)
def test_losses_are_those_of_peft_step_by_step(name, form):
    model, twin = pair(name)
    ours = train(model, name)
    assert_near(ours, train(twin, name), "loss")
    assert ours[0] != ours[1]


def test_patterns_train_as_in_peft():
    config = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2}}
    assert_gradients_are_those_of_peft(*pair("llama", **config), "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conv1d_of_gpt2(dtype, form):
    """peft refuses it; the dense layer with dW in it is the oracle."""
    model = wrap("gpt2", build("gpt2", dtype=dtype), target_modules=["c_attn", "c_proj", "c_fc"]).train()
    exact = build("gpt2", dtype=torch.float64)
    for path, layer in model.named_modules():
        if hasattr(layer, "adapters"):
            with torch.no_grad():
                exact.get_submodule(path).weight += delta(layer).t()
    assert_near(model(**model_batch("gpt2")).logits, exact(**model_batch("gpt2")).logits.to(dtype), "model")
    model(**model_batch("gpt2")).loss.backward()
    exact(**model_batch("gpt2")).loss.backward()
    layer, twin = model.transformer.h[0].mlp.c_fc, exact.transformer.h[0].mlp.c_fc
    unit = layer.unit("default")
    w1a, w1b, w2a, w2b = (getattr(unit, factor).detach().double() for factor in FACTORS)
    T = unit.scaling * twin.weight.grad.t()
    expected = (T * (w2a @ w2b)) @ w1b.t(), w1a.t() @ (T * (w2a @ w2b)), (T * (w1a @ w1b)) @ w2b.t()
    for factor, gradient in zip(FACTORS, (*expected, w2a.t() @ (T * (w1a @ w1b))), strict=True):
        assert_near(getattr(unit, factor).grad, gradient.to(dtype), "gradient")


def test_a_fresh_adapter_learns():
    model = wrap("llama", init_weights=True, target_modules="all-linear").train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=3e-2)
    losses = []
    for _ in range(20):
        losses.append(model(**model_batch("llama")).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 7), (2, 3, 7), (2, 0, 7), (2, 1, 3, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_leading_dimensions_and_dtype(shape, dtype, form):
    model = nn.Sequential(nn.Linear(7, 5)).to(dtype)
    pyadapt.wrap(model, LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    x = torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()
    y = model(x)
    W = model[0].weight.double() + delta(model[0])
    exact = x.detach().double() @ W.t() + model[0].bias.double()
    assert y.dtype == dtype
    assert_close(y, exact, "product", dtype)
    y.sum().backward()
    assert_close(x.grad, torch.ones_like(exact) @ W, "product", dtype)
    assert model[0].unit("default").hada_w1_a.grad.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_gradcheck(form):
    model = nn.Sequential(nn.Linear(5, 4)).double()
    pyadapt.wrap(model, LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(x, *factors):
        named = {f"0.adapters.default.{name}": value for name, value in zip(FACTORS, factors, strict=True)}
        return torch.func.functional_call(model, named, (x,))

    unit = model[0].unit("default")
    assert torch.autograd.gradcheck(function, (x, *(getattr(unit, name) for name in FACTORS)))


def test_double_backward_is_refused(form):
    model = nn.Sequential(nn.Linear(5, 4)).double()
    pyadapt.wrap(model, LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base, form):
    model, twin = pair("llama", model=build("llama", dtype=base))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(**model_batch("llama")).logits, twin(**model_batch("llama")).logits
        assert out.dtype == expected.dtype
        assert_near(out, expected, "model", torch.bfloat16)
        assert_near(train(model, "llama"), train(twin, "llama"), "loss", torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in trained(model).values())


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "base", "float32"])
def test_adapter_dtype(adapter_dtype):
    model = wrap("llama", build("llama", dtype=torch.bfloat16), adapter_dtype=adapter_dtype).train()
    wanted = torch.float32 if adapter_dtype == "float32" else torch.bfloat16
    model(**model_batch("llama")).loss.backward()
    assert {p.dtype for p in trained(model).values()} == {wanted}
    assert {p.grad.dtype for p in trained(model).values()} == {wanted}


# --- what is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_beside_x_are_r_squared_values_a_row(dtype, form):
    """Khatri-Rao: A, B and the M x r^2 of S; tiled: nothing. No mask, no cast copy, no dW."""
    M, K, N, r = 96, 48, 40, 3
    model = nn.Sequential(nn.Linear(K, N)).to(dtype)
    pyadapt.wrap(model, LoHaConfig(r=r, target_modules=["0"], init_weights=False))
    x = torch.randn(M, K).to(dtype).requires_grad_()
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(x)
    assert x.data_ptr() in storages
    known = {x.data_ptr(), *(p.data_ptr() for p in model.parameters())}
    beside = sum(size for place, size in storages.items() if place not in known)
    assert beside == (0 if form == "tiled" else r * r * (M * 4 + (N + K) * dtype.itemsize))


def test_the_route(monkeypatch):
    def planned(r):
        model = nn.Sequential(nn.Linear(256, 512))
        return pyadapt.plan(model, LoHaConfig(r=r, target_modules=["0"])).layers[0].kernel

    assert planned(4).startswith("khatri-rao, ")
    assert planned(24) == "tiled"
    asked = []
    monkeypatch.setattr(loha_linear.TiledHadamard, "apply", lambda *a: asked.append("tiled") or a[0].new_zeros(1))
    # A few rows do not pay for a dW.
    for r, rows in ((4, 512), (24, 512), (24, 8)):
        model = pyadapt.wrap(nn.Sequential(nn.Linear(256, 512)), LoHaConfig(r=r, target_modules=["0"]))
        asked.append(rows)
        model(torch.randn(rows, 256))
    assert asked == [512, 512, "tiled", 8]


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"rank_pattern": {"0": 2}}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_files_go_both_ways(variant, tmp_path):
    config = dict(variant)
    if "rank_pattern" in config:
        config["rank_pattern"] = {"q_proj": 2}
    model = wrap("llama", **config)
    model.save_pretrained(tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours")
    assert_near(logits(twin), logits(model), "model")
    twin.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    ours, theirs = (json.loads((tmp_path / which / "adapter_config.json").read_text()) for which in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert torch.equal(logits(pyadapt.load(build("llama"), tmp_path / "theirs")), logits(model))


def test_a_damaged_file(tmp_path):
    from safetensors.torch import save_file

    wrap("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("hada_w2_b"))
    tensors[key] = tensors[key][:1].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(pyadapt.AdapterFileError, match="hada_w2_b"):
        pyadapt.load(model, tmp_path)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"r": 2}, True),
        ({"alpha": 1}, True),
        ({"r": 2, "alpha_pattern": {"q_proj": 9}}, True),
        ({"target_modules": ["q_proj"]}, True),
        ({"r": 5}, False),
    ],
    ids=str,
)
def test_hotswap(changes, fits, tmp_path):
    torch.manual_seed(8)
    other = wrap("llama", **changes)
    other.save_pretrained(tmp_path)
    model = wrap("llama").eval()
    model.set_scale("default", 0.5)
    assert model.hotswap_adapter(tmp_path) is fits
    assert_near(logits(model), logits(other), "model")


# --- merging ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_and_exactly_back(name, dtype):
    model = wrap(name, build(name, dtype=dtype))
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    before = logits(model, name)
    model.merge_adapter()
    assert_near(logits(model, name), before, "merged")
    model.unmerge_adapter()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    assert_near(logits(pyadapt.merge(model), name), before, "merged")


def test_the_merged_model_is_that_of_peft():
    model, twin = pair("llama")
    ours, theirs = pyadapt.merge(model), twin.merge_and_unload()
    for key, value in theirs.state_dict().items():
        assert_near(ours.state_dict()[key], value, "merged")


def dequantised(model, name):
    """The dense model with the very values that quantised weights stand for."""
    from pyadapt.base import base_of

    dense = build(name)
    for path, layer in model.named_modules():
        kind = base_of(layer)
        if kind is not None and kind.quantized:
            W = kind.matrix(layer)
            twin = dense.get_submodule(path)
            with torch.no_grad():
                twin.weight.copy_(W.t() if type(twin).__name__ == "Conv1D" else W)
    return dense


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_int8_base_trains_and_merges(name, form):
    """peft fails at this merge; over the weights that int8 stands for, it is the oracle."""
    quantised = pyadapt.quantize(build(name))
    model, twin = pair(name, quantised, dequantised(quantised, name))
    assert_gradients_are_those_of_peft(model, twin, name)
    before, kept = logits(model.eval(), name), {key: v.clone() for key, v in model.state_dict().items()}
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert_near(logits(pyadapt.merge(model), name), before, "merged")


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt")
@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}], ids=str)
def test_bitsandbytes_base_trains_and_merges(how, tmp_path, monkeypatch):
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    build("llama").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**how)
    quantised = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    model, twin = pair("llama", quantised, dequantised(quantised, "llama"))
    model.set_adapter("default")
    unit = model.model.layers[0].self_attn.q_proj.unit("default")
    theirs = twin.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 24)
    layer = model.model.layers[0].self_attn.q_proj
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for factor in FACTORS:
        assert_near(getattr(unit, factor).grad, getattr(theirs, factor)["default"].grad, "gradient")
    W = layer.base.matrix(layer).double() + delta(layer)
    merged = pyadapt.merge(model)
    assert_near(merged.model.layers[0].self_attn.q_proj.weight, W.float(), "merged")


# --- several adapters -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_with_scales_are_those_of_peft(dtype, form):
    model, twin = pair("llama", model=build("llama", dtype=dtype))
    extra = options("llama", r=2, target_modules=["v_proj", "up_proj"])
    model.add_adapter("extra", LoHaConfig(**extra))
    twin.add_adapter("extra", peft.LoHaConfig(**extra))
    copy_adapter_to_peft(model, twin, "extra")
    model.set_adapter(["default", "extra"])
    twin.base_model.set_adapter(["default", "extra"])
    assert_gradients_are_those_of_peft(model, twin, "llama", dtype)
    model.set_scale("extra", 0.25)
    for module in twin.modules():
        if hasattr(module, "hada_w1_a"):
            module.set_scale("extra", 0.25)
    assert_near(logits(model), logits(twin), "model")
    both = logits(model)
    model.merge_adapter()
    assert_near(logits(model), both, "merged")


def test_beside_a_lora_and_a_trained_bias(form):
    model = nn.Sequential(nn.Linear(9, 7)).double()
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, bias="lora_only"), "lora")
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    with torch.no_grad():
        model[0].bias_of_lora.normal_()
    lora = model[0].unit("lora")
    for names in (["lora", "loha"], ["loha", "lora"]):
        model.set_adapter(names)
        x = torch.randn(5, 9, dtype=torch.float64)
        W = model[0].weight + lora.scaling * lora.lora_B @ lora.lora_A + delta(model[0], "loha")
        assert_near(model(x), x @ W.t() + model[0].bias_of_lora, "layer")
        model.zero_grad()
        model(x).sum().backward()
        assert_near(model[0].bias_of_lora.grad, torch.full((7,), 5.0, dtype=torch.float64), "gradient")


def test_no_dora_beside_it():
    model = wrap("llama")
    model.add_adapter("dora", LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="is no LoRA, has no place"):
        model.set_adapter(["default", "dora"])


def test_no_weighted_sum():
    model = wrap("llama")
    model.add_adapter("extra", LoHaConfig(**options("llama")))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"a weighted sum of LoHa adapters is no LoHa: .* set_adapter\(\[\.\.\.\]\)"):
        model.add_weighted_adapter(["default", "extra"], [0.5, 0.5], "sum")
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_row_its_adapter(name):
    model = wrap(name).eval()
    model.add_adapter("other", LoHaConfig(**options(name, r=2)))
    model.add_adapter("lora", LoraConfig(target_modules=list(FAMILIES[name].targets), init_lora_weights=False))
    names = ["other", "__base__", "default", "lora", "other"]
    batch = model_batch(name, rows=len(names))
    del batch["labels"]
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        for i, adapter in enumerate(names):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            if adapter == "__base__":
                with model.disable_adapter():
                    expected = model(**row).logits
            else:
                model.set_adapter(adapter)
                expected = model(**row).logits
            assert_near(mixed[i : i + 1], expected, "model")


def test_a_mixed_batch_trains_each_adapter_through_its_rows():
    model = wrap("llama").train()
    model.add_adapter("other", LoHaConfig(**options("llama", r=2)))
    model.requires_grad_(False)
    names = ["other", "default"]
    for adapter in names:
        model.set_requires_grad(adapter)
    batch = model_batch("llama")
    unit = {name: model.model.layers[0].self_attn.q_proj.unit(name) for name in names}
    model(input_ids=batch["input_ids"], adapter_names=names).logits.square().sum().backward()
    found = {name: unit[name].hada_w2_b.grad.clone() for name in names}
    for i, adapter in enumerate(names):
        model.set_adapter(adapter)
        model.zero_grad()
        model(input_ids=batch["input_ids"][i : i + 1]).logits.square().sum().backward()
        assert_near(found[adapter], unit[adapter].hada_w2_b.grad, "gradient")


# --- checkpointing and compiling --------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_dropout(reentrant, form):
    def gradients(checkpointing):
        torch.manual_seed(5)
        model = wrap("llama", rank_dropout=0.3, module_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(6)
        model(**model_batch("llama")).loss.backward()
        return {name: p.grad for name, p in trained(model).items()}

    plain, again = gradients(False), gradients(True)
    assert any(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        assert_near(again[name], gradient, "gradient")


def compare_compiled(model, batch):
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for which in (compiled, eager):
        torch.manual_seed(1)
        which(**batch).loss.backward()
    expected = {name: p.grad for name, p in trained(eager).items()}
    assert expected
    for name, parameter in trained(model).items():
        assert_near(parameter.grad, expected[name], "gradient")
    with torch.no_grad():
        assert_near(compiled.eval()(**batch).logits, eager.eval()(**batch).logits, "model")


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiles_in_one_piece(name, quantised, form):
    model = build(name)
    # Its class name says no loss of GPT-2; transformers then warns at each call, which no graph can hold.
    model.loss_type = "ForCausalLM"
    compare_compiled(wrap(name, pyadapt.quantize(model) if quantised else model).train(), model_batch(name))


@pytest.mark.slow
def test_compiles_with_dropout_and_beside_another():
    model = wrap("llama", rank_dropout=0.4, module_dropout=0.2)
    model.add_adapter("other", LoHaConfig(**options("llama", r=2)))
    model.set_adapter(["default", "other"])
    compare_compiled(model.train(), model_batch("llama"))


# --- dropout ----------------------------------------------------------------------------------


def test_rank_dropout_drops_rows_and_divides_by_the_share(form):
    """As in peft: each row of dW is kept or dropped, and what is kept is divided by the mean of the mask."""
    N, p, steps = 50, 0.4, 400
    model = nn.Sequential(nn.Linear(8, N, bias=False)).double()
    config = LoHaConfig(r=2, target_modules=["0"], init_weights=False, rank_dropout=p)
    pyadapt.wrap(model, config)
    x = torch.randn(3, 8, dtype=torch.float64)
    term = x @ delta(model[0]).t()
    frozen = x @ model[0].weight.t()
    kept = torch.zeros(N)
    with torch.no_grad():
        assert_near(model.eval()(x), frozen + term, "layer")
        for _ in range(steps):
            factors = ((model.train()(x) - frozen) / term).mean(0)
            alive = factors.abs() > 1e-6
            assert_near(factors, alive * N / alive.sum().clamp(min=1), "gradient")
            kept += alive
    share = kept / steps
    assert ((share - (1 - p)).abs() < 5 * (p * (1 - p) / steps) ** 0.5).all()


def test_a_step_that_drops_every_row_is_the_plain_layer(form):
    """peft divides 0 by 0 there."""
    model = nn.Sequential(nn.Linear(8, 2))
    pyadapt.wrap(model, LoHaConfig(r=2, target_modules=["0"], init_weights=False, rank_dropout=0.9))
    model.train()
    x = torch.randn(3, 8)
    plain = torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    with torch.no_grad():
        steps = [model(x) for _ in range(20)]
    assert all(torch.isfinite(y).all() for y in steps)
    assert any(torch.equal(y, plain) for y in steps)


def test_module_dropout_drops_the_whole_term(form):
    p, steps = 0.3, 400
    model = nn.Sequential(nn.Linear(8, 6))
    pyadapt.wrap(model, LoHaConfig(r=2, target_modules=["0"], init_weights=False, module_dropout=p))
    x = torch.randn(3, 8)
    with torch.no_grad():
        with_term = model.eval()(x)
        with model.disable_adapter():
            plain = model(x)
        outputs = [model.train()(x) for _ in range(steps)]
    dropped = 0
    for y in outputs:
        is_plain = bool((y - plain).abs().max() < (y - with_term).abs().max())
        assert_near(y, plain if is_plain else with_term, "layer")
        dropped += is_plain
    assert abs(dropped / steps - p) < 5 * (p * (1 - p) / steps) ** 0.5


def test_dropout_follows_the_seed():
    model = wrap("llama", rank_dropout=0.5).train()
    torch.manual_seed(7)
    one, two = logits(model), logits(model)
    torch.manual_seed(7)
    assert torch.equal(logits(model), one)
    assert not torch.equal(two, one)
