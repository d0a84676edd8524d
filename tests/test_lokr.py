"""LoKr on linear layers: the starts, losses, gradients and files of peft; the merged layer where peft has none."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, snapshot
from peft.tuners.lokr.layer import factorization as factorization_of_peft
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import pyadapt
from pyadapt import AdapterConfig, LoKrConfig, LoraConfig, native
from pyadapt.base import base_of
from pyadapt.methods.lycoris.lokr import factorization
from pyadapt.ops import routes

# Those that peft can adapt: all but GPT-2, whose Conv1D it refuses.
OF_PEFT = [name for name in FAMILIES if name != "gpt2"]
STEPS = 4
# Each combination of full and split factors: 24 features are 4 * 6, or 8 * 3 where 8 is asked for.
FORMS = {
    "w2 split": {},
    "both full": {"r": 8},
    "both split": {"r": 1, "decompose_both": True},
    "w1 split": {"r": 3, "decompose_both": True, "decompose_factor": 8},
    "factor 2": {"decompose_factor": 2},
    "factor 5": {"decompose_factor": 5, "r": 3},
}
every_form = pytest.mark.parametrize("form", FORMS)


def options(name, **config):
    task, targets = FAMILIES[name].task, list(FAMILIES[name].targets)
    return {"r": 2, "alpha": 5, "task_type": task, "target_modules": targets, "init_weights": False, **config}


def wrap(name, model=None, **config):
    return pyadapt.wrap(build(name) if model is None else model, LoKrConfig(**options(name, **config)))


def small(features=(6, 10), dtype=torch.float32, r=2, **config):
    """One linear layer of so many output and input features."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(features[1], features[0])).to(dtype)
    return pyadapt.wrap(model, LoKrConfig(r=r, target_modules=["0"], init_weights=False, **config))


def pair(name, model=None, base=None, **config):
    """Our wrapped model and peft's, with the same values, in training mode."""
    base = copy.deepcopy(build(name) if model is None else model) if base is None else base
    model = wrap(name, model, **config)
    twin = peft.get_peft_model(base, peft.LoKrConfig(**options(name, **config)))
    copy_adapter_to_peft(model, twin)
    return model.train(), twin.train()


def of_peft(own_name):
    """`...adapters.<name>.lokr_w1` -> `...lokr_w1.<name>`."""
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


def assert_gradients_are_those_of_peft(model, twin, name):
    model(**model_batch(name)).loss.backward()
    twin(**model_batch(name)).loss.backward()
    theirs = trained(twin)
    assert len(theirs) == len(trained(model)) > 0
    for key, parameter in trained(model).items():
        assert_near(parameter.grad, theirs[of_peft(key)].grad, "gradient")


def logits(model, name="llama"):
    with torch.no_grad():
        return model(**model_batch(name)).logits


def delta_of(scaling, values):
    """dW by the definition."""
    w1 = values.get("lokr_w1")
    w1 = values["lokr_w1_a"] @ values["lokr_w1_b"] if w1 is None else w1
    w2 = values.get("lokr_w2")
    w2 = values["lokr_w2_a"] @ values["lokr_w2_b"] if w2 is None else w2
    return scaling * torch.kron(w1, w2)


def delta(layer, name="default"):
    """dW of a layer's unit in fp64."""
    unit = layer.unit(name)
    return delta_of(unit.scaling, {key: value.detach().double() for key, value in unit.named_parameters()})


# --- configuration and shapes -----------------------------------------------------------------


def test_defaults_are_those_of_peft():
    theirs, ours = peft.LoKrConfig().to_dict(), LoKrConfig().to_dict()
    theirs["peft_type"] = theirs["peft_type"].value
    assert ours == theirs
    values = {"r": 3, "decompose_both": True, "decompose_factor": 4, "rank_dropout_scale": True}
    values |= {"init_weights": "lycoris", "rank_pattern": {"q_proj": 4}, "target_modules": {"v", "q"}}
    assert AdapterConfig.from_peft(peft.LoKrConfig(**values)) == LoKrConfig(**values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"r": 0}, "r=0: a rank is a whole number of at least 1"),
        ({"r": -2}, "r=-2: a rank"),
        ({"decompose_factor": 0}, "decompose_factor=0: a whole number of at least 1 is needed, or -1"),
        ({"decompose_factor": -2}, "decompose_factor=-2"),
        ({"decompose_factor": 1.5}, "decompose_factor=1.5"),
        ({"rank_dropout": 1.0}, r"rank_dropout=1.0 is not in \[0, 1\)"),
        ({"module_dropout": -0.1}, r"module_dropout=-0.1 is not in \[0, 1\)"),
        ({"init_weights": "kaiming"}, "init_weights='kaiming': LoKr knows True, False and \"lycoris\""),
        ({"lora_alpha": 3}, "LoKrConfig has no key 'lora_alpha'; did you mean 'alpha'"),
        ({"decompose_factors": 3}, "did you mean 'decompose_factor'"),
    ],
)
def test_bad_values(values, match):
    with pytest.raises(ValueError, match=match):
        AdapterConfig.from_dict({"peft_type": "LOKR", **values})


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj'; the nearest are"),
        ({"rank_pattern": {"nowhere": 2}}, "rank_pattern 'nowhere' matches none"),
        ({"target_modules": ["embed_tokens"]}, "LoKr cannot adapt embedding layers, only conv and linear ones"),
    ],
)
def test_what_does_not_fit_the_model(config, match):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        wrap("llama", model, **config)
    assert snapshot(model) == before


def test_dimensions_are_cut_as_in_peft():
    """Also where the factor does not divide, and where it is larger than the rest."""
    for size in [*range(1, 150), 360, 1023, 2048, 5504]:
        for factor in [-1, *range(1, 40), 97, size]:
            assert factorization(size, factor) == factorization_of_peft(size, factor), (size, factor)


@every_form
def test_a_plan_names_the_tensors_that_there_are(form):
    shapes = {row.path.split(".")[-1]: row.shapes for row in pyadapt.plan(
        build("llama"), LoKrConfig(**options("llama", target_modules="all-linear", **FORMS[form]))
    ).layers}  # fmt: skip
    twin = peft.get_peft_model(
        build("llama"), peft.LoKrConfig(**options("llama", target_modules="all-linear", **FORMS[form]))
    )
    theirs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, value in peft.get_peft_model_state_dict(twin).items():
        theirs.setdefault(key.split(".")[-2], {})[key.split(".")[-1]] = tuple(value.shape)
    assert shapes == theirs


# --- values -----------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("init_weights", [True, False, "lycoris"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_same_seed_gives_the_start_of_peft(name, init_weights, form):
    config = options(name, **FORMS[form], init_weights=init_weights)
    torch.manual_seed(3)
    twin = peft.get_peft_model(build(name), peft.LoKrConfig(**config))
    torch.manual_seed(3)
    model = pyadapt.wrap(build(name), LoKrConfig(**config))
    theirs = peft.get_peft_model_state_dict(twin)
    for key, value in model.get_adapter_state_dict().items():
        assert torch.equal(value, theirs[f"base_model.model.{key}"]), key
    assert torch.equal(logits(model, name), logits(build(name), name)) is (init_weights is not False)


@pytest.mark.parametrize("name", OF_PEFT)
@pytest.mark.parametrize("targets", ["default", "all-linear"])
def test_gradients_are_those_of_peft(name, targets):
    config = {} if targets == "default" else {"target_modules": targets}
    assert_gradients_are_those_of_peft(*pair(name, **config), name)


@every_form
def test_every_form_trains_as_in_peft(form):
    assert_gradients_are_those_of_peft(*pair("llama", target_modules="all-linear", **FORMS[form]), "llama")
    with routes.forced("reference"):
        assert_gradients_are_those_of_peft(*pair("llama", **FORMS[form]), "llama")


@pytest.mark.parametrize("name", OF_PEFT)
def test_losses_are_those_of_peft_step_by_step(name):
    model, twin = pair(name)
    ours = train(model, name)
    assert_near(ours, train(twin, name), "loss")
    assert ours[0] != ours[1]


def test_patterns_train_as_in_peft():
    config = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2}}
    assert_gradients_are_those_of_peft(*pair("llama", **config), "llama")


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conv1d_of_gpt2(dtype, form):
    """peft refuses it; the dense layer with dW in it is the oracle."""
    config = {"target_modules": ["c_attn", "c_proj", "c_fc"], **FORMS[form]}
    model = wrap("gpt2", build("gpt2", dtype=dtype), **config).train()
    exact = build("gpt2", dtype=torch.float64)
    for path, layer in model.named_modules():
        if hasattr(layer, "adapters"):
            with torch.no_grad():
                exact.get_submodule(path).weight += delta(layer).t()
    assert_near(model(**model_batch("gpt2")).logits, exact(**model_batch("gpt2")).logits.to(dtype), "model")
    model(**model_batch("gpt2")).loss.backward()
    exact(**model_batch("gpt2")).loss.backward()
    unit, twin = model.transformer.h[0].mlp.c_fc.unit("default"), exact.transformer.h[0].mlp.c_fc
    values = {key: value.detach().double().requires_grad_() for key, value in unit.named_parameters()}
    dW = delta_of(unit.scaling, values)
    expected = torch.autograd.grad(dW, list(values.values()), twin.weight.grad.t())
    for key, gradient in zip(values, expected, strict=True):
        assert_near(unit.get_parameter(key).grad, gradient.to(dtype), "gradient")


@pytest.mark.parametrize("init_weights", [True, "lycoris"])
def test_a_fresh_adapter_learns(init_weights):
    model = wrap("llama", init_weights=init_weights, target_modules="all-linear").train()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=3e-2)
    losses = []
    for _ in range(20):
        losses.append(model(**model_batch("llama")).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shape", [(10,), (1, 10), (0, 10), (2, 3, 10), (2, 0, 10), (2, 1, 3, 10)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [1, 4])
def test_any_leading_dimensions_and_dtype(shape, dtype, r):
    model = small(dtype=dtype, r=r)
    x = torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()
    y = model(x)
    W = model[0].weight.double() + delta(model[0])
    exact = x.detach().double() @ W.t() + model[0].bias.double()
    assert y.dtype == dtype
    assert_close(y, exact, "product", dtype)
    y.sum().backward()
    assert_close(x.grad, torch.ones_like(exact) @ W, "product", dtype)
    wanted = dtype if dtype == torch.float64 else torch.float32
    assert {p.grad.dtype for p in model[0].unit("default").parameters()} == {wanted}


@every_form
def test_gradcheck(form):
    model = small((8, 6), torch.float64, **{"r": 2, **FORMS[form]})
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    unit = dict(model[0].unit("default").named_parameters())

    def function(x, *values):
        named = {f"0.adapters.default.{name}": value for name, value in zip(unit, values, strict=True)}
        return torch.func.functional_call(model, named, (x,))

    assert torch.autograd.gradcheck(function, (x, *unit.values()))


def test_double_backward_is_refused():
    model = small(dtype=torch.float64)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["w2 split", "both split"])
def test_autocast(base, form):
    model, twin = pair("llama", model=build("llama", dtype=base), **FORMS[form])
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


# --- what is kept, and the route --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [2, 8])
def test_nothing_is_saved_beside_x_and_the_factors(dtype, r):
    model = small((40, 48), dtype, r=r).train()
    x = torch.randn(96, 48).to(dtype).requires_grad_()
    kept = set()

    def pack(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert kept == {x.data_ptr(), *(p.data_ptr() for p in model[0].unit("default").parameters())}


@pytest.mark.parametrize(
    ("dtype", "config", "ending"),
    [
        (torch.float32, {}, ", kronecker"),
        (torch.float64, {}, "reference, kronecker in torch"),
        (torch.float32, {"decompose_factor": 2, "r": 512}, ", kronecker in torch"),
    ],
    ids=str,
)
def test_the_route(dtype, config, ending):
    model = nn.Sequential(nn.Linear(2048, 2048, dtype=dtype))
    (row,) = pyadapt.plan(model, LoKrConfig(target_modules=["0"], **config)).layers
    assert row.kernel.endswith(ending if native.available() else " in torch")


# --- files ------------------------------------------------------------------------------------


@every_form
def test_files_go_both_ways(form, tmp_path):
    model = wrap("llama", target_modules="all-linear", modules_to_save=["lm_head"], **FORMS[form])
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
    wrap("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("lokr_w1"))
    tensors[key] = tensors[key][:1].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(pyadapt.AdapterFileError, match="lokr_w1"):
        pyadapt.load(model, tmp_path)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"r": 1}, True),
        ({"alpha": 1}, True),
        ({"r": 1, "alpha_pattern": {"q_proj": 9}}, True),
        ({"target_modules": ["q_proj"]}, True),
        ({"r": 8}, False),
        ({"decompose_factor": 2}, False),
        ({"r": 1, "decompose_both": True}, False),
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


@pytest.mark.parametrize("r", [1, 3])
def test_hotswap_of_a_split_w1(r, tmp_path):
    form = {"decompose_both": True, "decompose_factor": 8, "rank_pattern": {"v_proj": 3}}
    wrap("llama", r=r, alpha=2, **form).save_pretrained(tmp_path)
    model = wrap("llama", r=3, **form).eval()
    # At rank 1 w2 of q_proj is split, and at rank 3 full.
    assert model.hotswap_adapter(tmp_path) is (r == 3)
    assert_near(logits(model), logits(pyadapt.load(build("llama"), tmp_path)), "model")


# --- merging ----------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_and_exactly_back(name, dtype, form):
    model = wrap(name, build(name, dtype=dtype), **FORMS[form])
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
def test_int8_base_trains_and_merges(name):
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
    layer, theirs = (m.layers[0].self_attn.q_proj for m in (model.model, twin.base_model.model.model))
    x = torch.randn(4, 24)
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for name, parameter in layer.unit("default").named_parameters():
        assert_near(parameter.grad, getattr(theirs, name)["default"].grad, "gradient")
    W = layer.base.matrix(layer).double() + delta(layer)
    merged = pyadapt.merge(model)
    assert_near(merged.model.layers[0].self_attn.q_proj.weight, W.float(), "merged")


# --- several adapters -------------------------------------------------------------------------


def test_several_adapters_with_scales_are_those_of_peft():
    model, twin = pair("llama")
    extra = options("llama", r=8, target_modules=["v_proj", "up_proj"])
    model.add_adapter("extra", LoKrConfig(**extra))
    twin.add_adapter("extra", peft.LoKrConfig(**extra))
    copy_adapter_to_peft(model, twin, "extra")
    model.set_adapter(["default", "extra"])
    twin.base_model.set_adapter(["default", "extra"])
    assert_gradients_are_those_of_peft(model, twin, "llama")
    model.set_scale("extra", 0.25)
    for module in twin.modules():
        if hasattr(module, "lokr_w1"):
            module.set_scale("extra", 0.25)
    assert_near(logits(model), logits(twin), "model")
    both = logits(model)
    model.merge_adapter()
    assert_near(logits(model), both, "merged")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beside_a_lora_and_a_trained_bias(dtype):
    model = nn.Sequential(nn.Linear(9, 6)).to(dtype)
    pyadapt.wrap(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, bias="lora_only"), "lora")
    model.add_adapter("lokr", LoKrConfig(r=1, target_modules=["0"], init_weights=False))
    with torch.no_grad():
        model[0].bias_of_lora.normal_()
    lora = model[0].unit("lora")
    for names in (["lora", "lokr"], ["lokr", "lora"]):
        model.set_adapter(names)
        x = torch.randn(5, 9, dtype=dtype)
        W = model[0].weight + lora.scaling * lora.lora_B @ lora.lora_A + delta(model[0], "lokr").to(dtype)
        assert_near(model(x), x @ W.t() + model[0].bias_of_lora, "merged")
        model.zero_grad()
        model(x).sum().backward()
        assert_near(model[0].bias_of_lora.grad, torch.full((6,), 5.0, dtype=dtype), "gradient")


def test_no_dora_beside_it():
    model = wrap("llama")
    model.add_adapter("dora", LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="is no LoRA, has no place"):
        model.set_adapter(["default", "dora"])


def test_no_weighted_sum():
    model = wrap("llama")
    model.add_adapter("extra", LoKrConfig(**options("llama")))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"a weighted sum of LoKr adapters is no LoKr: .* set_adapter\(\[\.\.\.\]\)"):
        model.add_weighted_adapter(["default", "extra"], [0.5, 0.5], "sum")
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_row_its_adapter(name):
    model = wrap(name).eval()
    model.add_adapter("other", LoKrConfig(**options(name, r=8)))
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


# --- checkpointing and compiling --------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", ["w2 split", "both split"])
def test_checkpointing_replays_the_dropout(reentrant, form):
    def gradients(checkpointing):
        torch.manual_seed(5)
        model = wrap("llama", rank_dropout=0.3, module_dropout=0.2, **FORMS[form]).train()
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


@every_form
def test_a_layer_compiles_in_one_piece(form):
    model = small((24, 36), **{"r": 2, **FORMS[form]}).train()
    eager, x = copy.deepcopy(model), torch.randn(5, 36)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for which in (compiled, eager):
        which(x).square().sum().backward()
    expected = {name: p.grad for name, p in trained(eager).items()}
    for name, parameter in trained(model).items():
        assert_near(parameter.grad, expected[name], "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiles_in_one_piece(name, quantised):
    model = build(name)
    # Its class name says no loss of GPT-2; transformers then warns at each call, which no graph can hold.
    model.loss_type = "ForCausalLM"
    compare_compiled(wrap(name, pyadapt.quantize(model) if quantised else model).train(), model_batch(name))


@pytest.mark.slow
def test_compiles_with_dropout_and_beside_another():
    model = wrap("llama", rank_dropout=0.4, module_dropout=0.2, rank_dropout_scale=True)
    model.add_adapter("other", LoKrConfig(**options("llama", r=8)))
    model.set_adapter(["default", "other"])
    compare_compiled(model.train(), model_batch("llama"))


# --- dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("r", [1, 8])
def test_rank_dropout_drops_rows(scale, r):
    """As in peft: each row of dW is kept or dropped; with a scale it is divided by the mean of the mask."""
    N, p, steps = 50, 0.4, 400
    model = nn.Sequential(nn.Linear(8, N, bias=False)).double()
    config = {"r": r, "target_modules": ["0"], "init_weights": False}
    pyadapt.wrap(model, LoKrConfig(rank_dropout=p, rank_dropout_scale=scale, **config))
    x = torch.randn(3, 8, dtype=torch.float64)
    term = x @ delta(model[0]).t()
    frozen = x @ model[0].weight.t()
    kept = torch.zeros(N)
    with torch.no_grad():
        assert_near(model.eval()(x), frozen + term, "layer")
        for _ in range(steps):
            step = model.train()(x) - frozen
            alive = step.abs().amax(0) > 1e-9
            assert_near(step, term * alive * (N / alive.sum().clamp(min=1) if scale else 1), "gradient")
            kept += alive
    share = kept / steps
    assert ((share - (1 - p)).abs() < 5 * (p * (1 - p) / steps) ** 0.5).all()


@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_dropout_in_backward_is_that_of_forward(r, dtype):
    model = small((12, 10), dtype, r=r, rank_dropout=0.5, rank_dropout_scale=True).train()
    x = torch.randn(7, 10, dtype=dtype, requires_grad=True)
    unit = model[0].unit("default")
    torch.manual_seed(4)
    y = model(x)
    torch.manual_seed(4)
    factors = unit.output_factors(x, 12).double()
    assert 0 < (factors == 0).sum() < 12
    values = {key: value.detach().double().requires_grad_() for key, value in unit.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    W = model[0].weight.double() + factors[:, None] * delta_of(unit.scaling, values)
    exact = exact_x @ W.t() + model[0].bias.double()
    assert_near(y, exact.to(dtype), "merged")
    y.square().sum().backward()
    exact.square().sum().backward()
    assert_near(x.grad, exact_x.grad.to(dtype), "gradient")
    for key, value in values.items():
        assert_near(unit.get_parameter(key).grad, value.grad.to(dtype), "gradient")


def test_module_dropout_drops_the_whole_term():
    p, steps = 0.3, 400
    model = small((6, 8), r=1, module_dropout=p)
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
