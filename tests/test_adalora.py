"""AdaLoRA on layers: values, gradients and starts are peft's; every kind of layer, base and way to run it."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from adalora_cases import config_of, factors, peft_name, randomise, share, twin_of, wrapped
from models import ALL, FAMILIES, assert_near, build, model_batch, snapshot
from tolerance import assert_close
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyadapt
from pyadapt import AdaLoraConfig, LoraConfig


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ALL)
def test_a_seed_starts_as_it_does_in_peft(name):
    theirs = dict(twin_of(name).named_parameters())
    ours = factors(wrapped(name))
    assert len(ours) == 3 * FAMILIES[name].target_count
    for key, parameter in ours.items():
        assert torch.equal(parameter, theirs[peft_name(key)]), key
        assert ("lora_E" in key) == bool((parameter == 0).all())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("config", [{}, {"lora_alpha": -1}, {"orth_reg_weight": 0.1}], ids=str)
def test_losses_and_gradients_equal_those_of_peft(name, config):
    model, twin = randomise(wrapped(name, **config)).train(), twin_of(name, **config).train()
    share(model, twin)
    batch = model_batch(name)
    loss, ours = gradients(model, batch)
    expected, theirs = gradients(twin, batch)
    assert_near(loss, expected, "loss")
    for key in factors(model):
        assert_near(ours[key], theirs[peft_name(key)], "gradient")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_linear_and_a_bias_train_as_in_peft(name):
    options = {"target_modules": "all-linear", "bias": "all"}
    model, twin = randomise(wrapped(name, **options)).train(), twin_of(name, **options).train()
    share(model, twin)
    loss, ours = gradients(model, model_batch(name))
    expected, theirs = gradients(twin, model_batch(name))
    assert_near(loss, expected, "loss")
    assert len(ours) == len(theirs)


def test_both_factors_random_at_first():
    theirs = dict(twin_of(init_lora_weights=False).named_parameters())
    for key, parameter in factors(wrapped(init_lora_weights=False)).items():
        assert torch.equal(parameter, theirs[peft_name(key)])


def one_layer(dtype=torch.float32, K=19, N=13, bias=True, config=(), **start):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype)
    options = {"target_modules": ["0"], "init_r": 5, "target_r": 2, "total_step": 9, **dict(config), **start}
    return randomise(pyadapt.wrap(model, AdaLoraConfig(**options)))


def formula(model, x, dtype=torch.float64):
    """(y, the gradients of its sum with cosines) by the definition in fp64."""
    unit, layer = model[0].adapters["default"], model[0]
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, unit.lora_A, unit.lora_B, unit.lora_E)]
    x, A, B, E = leaves
    y = x @ layer.weight.to(dtype).t() + unit.scaling * (x @ (A * E).t() @ B.t())
    y = y if layer.bias is None else y + layer.bias.to(dtype)
    (y * y.detach().cos()).sum().backward()
    return y, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 19), (2, 7, 19), (0, 19)], ids=str)
def test_one_layer_is_the_formula(dtype, shape):
    model = one_layer(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    unit = model[0].adapters["default"]
    assert unit.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    y = model(x)
    expected, grads = formula(model, x)
    assert y.dtype == dtype
    assert_close(y, expected, "product", dtype)
    (y * expected.detach().cos().to(dtype)).sum().backward()
    for value, exact in zip((x.grad, unit.lora_A.grad, unit.lora_B.grad, unit.lora_E.grad), grads, strict=True):
        assert_close(value.reshape(exact.shape), exact, "gradient" if dtype != torch.float16 else "product", dtype)


def test_the_gradient_is_checked():
    model = one_layer(torch.float64, bias=False)
    x = torch.randn(4, 19, dtype=torch.float64, requires_grad=True)
    names = [f"0.adapters.default.lora_{factor}" for factor in "ABE"]
    leaves = [model.get_parameter(name) for name in names]

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *leaves))


def test_a_second_backward_is_refused():
    model = one_layer()
    x = torch.randn(2, 19, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|once_differentiable"):
        grad.sum().backward()


def test_dropout_keeps_its_mask_in_backward():
    model = one_layer(torch.float64, config={"lora_dropout": 0.4}).train()
    x = torch.randn(6, 19, dtype=torch.float64, requires_grad=True)
    unit = model[0].adapters["default"]

    def run(x, A, E):
        torch.manual_seed(5)
        values = {"0.adapters.default.lora_A": A, "0.adapters.default.lora_E": E}
        return torch.func.functional_call(model, values, (x,))

    assert torch.autograd.gradcheck(run, (x, unit.lora_A, unit.lora_E))
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


# --- convolutions -----------------------------------------------------------------------------

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (9, 7), 3: (5, 6, 4)}
GEOMETRIES = [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"kernel_size": 1, "bias": False}]


def convolution(dims, dtype=torch.float32, config=(), **options):
    torch.manual_seed(0)
    model = nn.Sequential(CONVOLUTIONS[dims](4, 6, **{"kernel_size": 3, **options})).to(dtype).eval()
    settings = {"target_modules": ["0"], "init_r": 3, "target_r": 2, "total_step": 9, **dict(config)}
    return model, settings


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_convolutions_are_those_of_peft(options):
    plain, settings = convolution(2, **options)
    twin = peft.get_peft_model(copy.deepcopy(plain), peft.AdaLoraConfig(**settings)).eval()
    model = randomise(pyadapt.wrap(plain, AdaLoraConfig(**settings)))
    share(model, twin)
    x, x_peft = (torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    y, expected = model(x), twin(x_peft)
    assert_near(y, expected, "layer")
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_near(x.grad, x_peft.grad, "gradient")
    theirs = dict(twin.named_parameters())
    for key, parameter in factors(model).items():
        assert_near(parameter.grad, theirs[peft_name(key)].grad, "gradient")


@pytest.mark.parametrize("dims", CONVOLUTIONS)
@pytest.mark.parametrize("options", [*GEOMETRIES, {"padding": 1, "padding_mode": "circular"}], ids=str)
def test_merged_convolutions_are_unmerged_ones(dims, options):
    """Also with a padding mode, which peft loses."""
    plain, settings = convolution(dims, torch.float64, **options)
    x = torch.randn(2, 4, *SIZES[dims], dtype=torch.float64)
    without = plain(x)
    model = randomise(pyadapt.wrap(plain, AdaLoraConfig(**settings)))
    expected = model(x)
    assert not torch.allclose(expected, without)
    model.merge_adapter()
    assert_near(model(x), expected, "merged")
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), without)


def test_groups_are_refused():
    """peft cannot even call such a layer: its delta has not the weight's shape."""
    plain, settings = convolution(2, groups=2)
    before = snapshot(plain)
    with pytest.raises(ValueError, match=r"0 \(Conv2d\): .* convolution with 2 groups"):
        pyadapt.wrap(plain, AdaLoraConfig(**settings))
    assert snapshot(plain) == before


# --- bases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_base_trains_and_merges(dtype):
    model = nn.Sequential(nn.Linear(32, 24)).to(dtype)
    pyadapt.quantize(model)
    pyadapt.wrap(model, AdaLoraConfig(target_modules=["0"], total_step=9))
    randomise(model)
    q, scale, bias = model[0].operands()
    dense = nn.Linear(32, 24).double()
    with torch.no_grad():
        dense.weight.copy_(q.double() * scale.double()[:, None])
        dense.bias.copy_(bias.double())
    unit = model[0].adapters["default"]
    x = torch.randn(8, 32).to(dtype)
    y = model(x)
    exact = dense(x.double()) + unit.scaling * (
        x.double() @ (unit.lora_A * unit.lora_E).double().t() @ unit.lora_B.double().t()
    )
    assert_close(y, exact, "product", dtype)
    y.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in unit.parameters())
    plain = pyadapt.merge(model)
    assert type(plain[0]) is nn.Linear
    assert_close(plain[0].weight, dense.weight + unit.delta(), "merged" if dtype != torch.float16 else "product", dtype)


@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["int8", "nf4"])
def test_bitsandbytes_base_trains_and_merges(how, tmp_path, monkeypatch):
    """peft cannot merge there."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    build("llama").save_pretrained(tmp_path)
    plain = type(build("llama")).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**how)).eval()
    model = randomise(wrapped(model=plain))
    batch = model_batch("llama")
    _, ours = gradients(model, batch)
    assert sum(".lora_" in key for key in ours) == 12
    assert all(bool(ours[key].abs().sum() > 0) for key in factors(model))
    # The same adapter over the weights that the quantised ones stand for.
    dense = build("llama")
    for path, layer in model.named_modules():
        base = pyadapt.base.base_of(layer) if path else None
        if base is not None and base.quantized:
            with torch.no_grad():
                dense.get_submodule(path).weight.copy_(base.matrix(layer))
    reference = wrapped(model=dense)
    with torch.no_grad():
        for key, parameter in factors(reference).items():
            parameter.copy_(model.get_parameter(key))
    merged, expected = pyadapt.merge(model), pyadapt.merge(reference)
    for row in pyadapt.plan(expected, AdaLoraConfig(**config_of())).layers:
        weight, exact = (tree.get_submodule(row.path).weight for tree in (merged, expected))
        assert_near(weight, exact.to(weight.dtype), "merged")


def test_ragged_and_transposed_layers_merge_exactly():
    model = randomise(wrapped("gpt2", target_modules="all-linear"))
    batch = model_batch("gpt2")
    expected = model(**batch).logits
    model.merge_adapter()
    assert_near(model(**batch).logits, expected, "merged")
    model.unmerge_adapter()
    assert torch.equal(model(**batch).logits, expected)


# --- ways to run it ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = randomise(wrapped(target_modules="all-linear", lora_dropout=0.2)).train()
    torch.manual_seed(2)
    loss, expected = gradients(model, model_batch("llama"))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(2)
    again, found = gradients(model, model_batch("llama"))
    assert torch.equal(loss, again)
    for key, gradient in expected.items():
        assert_near(found[key], gradient, "gradient")


def test_autocast():
    model = randomise(wrapped()).train()
    expected, _ = gradients(model, model_batch("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = gradients(model, model_batch("llama"))
    assert_near(loss, expected, "loss", torch.bfloat16)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_compiles_in_one_piece(family):
    """With the term of orthogonality in the loss."""
    model = randomise(wrapped(family)).train()
    eager = copy.deepcopy(model)
    batch = model_batch(family)
    expected_loss, expected = gradients(eager, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, found = gradients(compiled, batch)
    assert_near(loss, expected_loss, "loss")
    for key, gradient in expected.items():
        assert_near(found[f"_orig_mod.{key}"], gradient, "gradient")
    model.eval()
    assert_near(compiled(**batch).logits, eager.eval()(**batch).logits, "model")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convolution", "Conv1D"])
def test_other_layers_compile_in_one_piece(kind):
    plain, settings = convolution(2, padding=1)
    x = torch.randn(2, 4, 9, 7)
    if kind == "Conv1D":
        plain, x = nn.Sequential(Conv1D(6, 7)), torch.randn(2, 4, 7)
    model = randomise(pyadapt.wrap(plain, AdaLoraConfig(**settings)))
    expected = model(x)
    expected.square().sum().backward()
    grads = {key: p.grad.clone() for key, p in factors(model).items()}
    model.zero_grad()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    y.square().sum().backward()
    assert_near(y, expected, "layer")
    for key, parameter in factors(model).items():
        assert_near(parameter.grad, grads[key], "gradient")


def test_each_row_its_adapter():
    model = randomise(wrapped())
    model.add_adapter("lora", LoraConfig(r=3, init_lora_weights=False))
    model.add_adapter("second", AdaLoraConfig(**config_of(init_lora_weights=False, init_r=3)))
    model.eval()
    batch = model_batch("llama", rows=4)
    del batch["labels"]
    names = ["second", "__base__", "default", "lora"]
    mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(**batch).logits
        else:
            model.set_adapter(name)
            alone = model(**batch).logits
        assert_near(mixed[row], alone[row], "model")


def test_several_at_once_add_up():
    model = one_layer(torch.float64)
    model.add_adapter("second", LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    x = torch.randn(3, 19, dtype=torch.float64)
    with model.disable_adapter():
        plain = model(x)
    first = model(x)
    model.set_adapter("second")
    second = model(x)
    for order in (["default", "second"], ["second", "default"]):
        model.set_adapter(order)
        assert_near(model(x), first + second - plain, "merged")
    model.merge_adapter()
    assert_near(model(x), first + second - plain, "merged")


def test_scale():
    model = one_layer(torch.float64)
    x = torch.randn(3, 19, dtype=torch.float64)
    with model.disable_adapter():
        plain = model(x)
    once = model(x)
    model.set_scale("default", 3)
    assert_near(model(x) - plain, 3 * (once - plain), "merged")
    with model.rescaled(0):
        assert_near(model(x), plain, "merged")


def test_no_copy_of_the_input_is_kept():
    model = one_layer(torch.bfloat16, K=64, N=48)
    x = torch.randn(128, 64).bfloat16().requires_grad_()
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    known = {t.data_ptr() for t in (x, *model[0].adapters["default"].parameters())}
    # The product of A and E, and S = x A'.
    assert x.data_ptr() in sizes
    assert sum(size for place, size in sizes.items() if place not in known) <= 5 * 64 * 4 + 128 * 5 * 4


# --- what it says of itself -------------------------------------------------------------------


def test_plan_report_and_repr():
    model = build("llama")
    plan = pyadapt.plan(model, AdaLoraConfig(**config_of()))
    row = plan.layers[0]
    assert (row.rank, row.shapes) == (4, {"lora_A": (4, 24), "lora_B": (24, 4), "lora_E": (4, 1)})
    assert row.kernel == pyadapt.plan(model, LoraConfig(r=4, target_modules=["q_proj"])).layers[0].kernel
    wrapped(model=model)
    trained, total = model.get_nb_trainable_parameters()
    assert trained == plan.trainable_parameters == sum(p.numel() for p in factors(model).values())
    # peft counts one `ranknum` a layer among all its parameters; nothing of the kind is a parameter here.
    twin = twin_of()
    assert (trained, total) == (twin.get_nb_trainable_parameters()[0], twin.get_nb_trainable_parameters()[1] - 4)
    assert "LinearUnit(r=4, scaling=2.24999, dropout=0)" in repr(model)
    status = model.get_model_status()
    assert status.peft_types == {"default": "ADALORA"}
    assert status.requires_grad == {"default": True}


def test_loraplus_groups_are_those_of_peft():
    """E learns at the rate of A."""
    from peft.optimizers import create_loraplus_optimizer

    ours = pyadapt.optim.loraplus_parameter_groups(wrapped(), lr=1e-3, loraplus_lr_ratio=16)
    theirs = create_loraplus_optimizer(twin_of(), torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16).param_groups
    sizes = [
        {group["lr"]: sorted(tuple(p.shape) for p in group["params"]) for group in groups if group["params"]}
        for groups in (ours, theirs)
    ]
    assert sizes[0] == sizes[1]
    assert (4, 1) in sizes[0][1e-3]


def test_weighted_combinations_are_refused_with_the_way_out(tmp_path):
    model = randomise(wrapped())
    model.add_adapter("second", AdaLoraConfig(**config_of()))
    with pytest.raises(ValueError, match="as_plain_lora=True"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    assert list(model.peft_config) == ["default", "second"]


# --- configurations ---------------------------------------------------------------------------


def test_defaults_are_those_of_peft():
    theirs, ours = peft.AdaLoraConfig(total_step=10).to_dict(), AdaLoraConfig(total_step=10).to_dict()
    for key in ("peft_version", "runtime_config"):
        theirs.pop(key, None)
        ours.pop(key, None)
    theirs["peft_type"] = theirs["peft_type"].value
    # What LoRA writes as an empty dict is a missing one here.
    assert ours == theirs
    assert pyadapt.AdapterConfig.from_peft(peft.AdaLoraConfig(total_step=10)) == AdaLoraConfig(total_step=10)


def test_default_targets_are_those_of_peft():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as THEIRS

    from pyadapt.targets import DEFAULT_TARGETS

    ours = {**DEFAULT_TARGETS, **AdaLoraConfig.default_targets}
    # A regular expression, which no table of ours has: those models are read by structure, as for LoRA.
    lists = {model_type: targets for model_type, targets in THEIRS.items() if isinstance(targets, list)}
    assert {model_type: sorted(ours[model_type]) for model_type in lists} == {
        model_type: sorted(targets) for model_type, targets in lists.items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_step": None}, "total_step is missing"),
        ({"total_step": 0}, "total_step=0 is no whole number of at least 1"),
        ({"total_step": 10.0}, "total_step=10.0 is no whole number"),
        ({"tinit": 6, "tfinal": 4, "total_step": 10}, "the schedule ends before it begins"),
        ({"tinit": -1}, "tinit=-1 is no whole number of at least 0"),
        ({"tfinal": 2.5}, "tfinal=2.5 is no whole number"),
        ({"deltaT": 0}, "deltaT=0 is no whole number of at least 1"),
        ({"beta1": 1.0}, r"beta1=1.0 is not in \(0, 1\)"),
        ({"beta2": 0.0}, r"beta2=0.0 is not in \(0, 1\)"),
        ({"beta2": float("nan")}, r"beta2=nan is not in \(0, 1\)"),
        ({"orth_reg_weight": -0.5}, "orth_reg_weight=-0.5 is negative"),
        ({"init_r": 0}, "init_r=0 is no whole number of at least 1"),
        ({"target_r": 0}, "target_r=0 is no whole number of at least 1"),
        ({"init_r": 4, "target_r": 8}, "target_r=8 is above init_r=4"),
        ({"use_dora": True}, "use_dora=True: AdaLoRA cannot be combined with it"),
        ({"loftq_config": {"loftq_bits": 4}}, "AdaLoRA cannot be combined with it"),
        ({"target_parameters": ["q_proj.weight"]}, "AdaLoRA cannot be combined with it"),
        ({"use_rslora": True}, "use_rslora=True: AdaLoRA has no such option"),
        ({"lora_bias": True}, "lora_bias=True: AdaLoRA has no such option"),
        ({"alpha_pattern": {"q": 2}}, "alpha_pattern=.* AdaLoRA has no such option"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': AdaLoRA has no such option"),
        ({"rank_pattern": {"q_proj": 3}}, "is written by training"),
        ({"rank_pattern": {"q_proj.lora_E": [True]}, "init_r": 12}, "with init_r=12"),
        ({"rank_pattern": []}, "is written by training"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig(**{"total_step": 20, **options})


def test_an_unknown_key_is_refused_with_the_near_one():
    with pytest.raises(ValueError, match="AdaLoraConfig has no key 'total_steps'; did you mean 'total_step'"):
        pyadapt.AdapterConfig.from_dict({"peft_type": "ADALORA", "total_steps": 4})


def test_r_is_not_used_and_said_so(caplog):
    assert AdaLoraConfig(r=16, total_step=9).init_r == 12
    assert "r=16 is not used: AdaLoRA starts from init_r=12" in caplog.text


def test_what_is_not_trained_needs_no_schedule(caplog, tmp_path):
    """Old files of peft have no total_step; and peft passes over options of LoRA that mean nothing here."""
    config = AdaLoraConfig(inference_mode=True, target_r=99, use_rslora=True, init_lora_weights="pissa")
    assert (config.use_rslora, config.init_lora_weights) == (False, True)
    assert "use_rslora=True is passed over" in caplog.text
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="target_r=99 is above"):
        pyadapt.wrap(model, config)
    assert snapshot(model) == before


def test_a_pattern_of_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"rank_pattern 'k_proj.lora_E' names none of the 4 adapted layers"):
        wrapped(rank_pattern={"k_proj.lora_E": [True] * 4})


def test_loading_to_train_is_refused_before_anything_changes(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"total_step": 14', '"total_step": null'))
    fresh = build("llama")
    before = snapshot(fresh)
    with pytest.raises(ValueError, match="total_step is missing"):
        pyadapt.load(fresh, tmp_path, is_trainable=True)
    assert snapshot(fresh) == before
    other = pyadapt.wrap(build("llama"), LoraConfig())
    before = snapshot(other)
    with pytest.raises(ValueError, match="total_step is missing"):
        other.load_adapter(tmp_path, "second", is_trainable=True)
    assert snapshot(other) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pyadapt.load(fresh, tmp_path)(**model_batch("llama")).loss > 0
