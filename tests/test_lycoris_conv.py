"""LoHa and LoKr on convolutions: peft's where it keeps the layer's geometry, the merged layer in fp64 always."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from lycoris_cases import (
    CLASSES,
    CONVS,
    LOHA_CONVS,
    LOKR_CONVS,
    among,
    chosen,
    data,
    exact,
    given,
    net,
    twin_of,
    wrapped,
)
from models import assert_near
from safetensors.torch import load_file
from tolerance import assert_close

import pyadapt

KEPT = [{}, {"stride": 2}, {"padding": 1}, {"padding": "same"}, {"kernel_size": 1}, {"bias": False}]
KEPT += [{"dilation": 2, "padding": 2}, {"groups": 2}, {"groups": 2, "stride": 2, "padding": 1, "kernel_size": 2}]
LOST = [{"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")]
LOST += [{"padding": "same", "padding_mode": "reflect", "dilation": 2}]
FLAT, EFFECTIVE, SPLIT = LOHA_CONVS[0], LOHA_CONVS[2], LOKR_CONVS[0]

both = among([FLAT, SPLIT])
every_form = among(CONVS)
# How a LoHa runs changes neither its values nor its files.
SHAPES = [FLAT, EFFECTIVE, *LOKR_CONVS]
# All that peft has, but for one that it has wrong: see `test_lokr_conv.py`.
PEFT_IS_WRONG = {(1, "LoKr full")}


def of_peft(cases):
    """Parametrise by the dimensions and the cases of which peft is the oracle."""
    pairs = [(dims, case) for dims in (1, 2) for case in cases if (dims, str(case)) not in PEFT_IS_WRONG]
    return pytest.mark.parametrize(("dims", "case"), pairs, ids=str, indirect=["case"])


def named(layer):
    return "-".join(f"{key}={value}" for key, value in layer.items()) or "plain"


@pytest.fixture
def case(request, monkeypatch):
    return chosen(request, monkeypatch)


def assert_is(model, x, expected, dtype, what="gradient"):
    """The output, and after a step the gradients of x and of each factor, are those that `exact` has found."""
    y = model(x)
    y.backward(given(y))
    exact_y, dx, gradients = expected
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert_close(y, exact_y, "layer" if what == "gradient" else what, dtype)
    assert_close(x.grad, dx, what, dtype)
    for key, gradient in gradients.items():
        assert_close(model[0].unit("default").get_parameter(key).grad, gradient, what, dtype)
    assert model[0].weight.grad is None


@among(SHAPES)
@pytest.mark.parametrize("dims", [1, 2])
def test_the_same_seed_gives_the_start_of_peft(case, dims):
    for init_weights in case.inits:
        options = case.options(init_weights=init_weights)
        torch.manual_seed(4)
        plain = net(dims)
        torch.manual_seed(4)
        twin = peft.get_peft_model(copy.deepcopy(plain), case.theirs(**options))
        torch.manual_seed(4)
        model = pyadapt.wrap(plain, case.ours(**options))
        theirs, ours = peft.get_peft_model_state_dict(twin), model.get_adapter_state_dict()
        assert len(ours) == len(theirs)
        for key, value in ours.items():
            assert torch.equal(value, theirs[f"base_model.model.{key}"]), (init_weights, key)
        assert torch.equal(model(data(dims)), net(dims)(data(dims))) is (init_weights is not False), init_weights


@of_peft(CONVS)
@pytest.mark.parametrize("layer", KEPT, ids=named)
def test_values_and_gradients_are_those_of_peft(case, dims, layer):
    model = wrapped(case, dims, **layer)
    twin = twin_of(case, model, dims, **layer)
    x, x_peft = data(dims).requires_grad_(), data(dims).requires_grad_()
    y, expected = model(x), twin(x_peft)
    assert_near(y, expected, "merged" if case.method == "LoKr" else "layer")
    y.square().sum().backward()
    expected.square().sum().backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in twin.named_parameters()}
    unit = dict(model[0].unit("default").named_parameters())
    for name, parameter in unit.items():
        # These it has wrong: see `test_loha_conv.py`.
        if not ("hada_t1" in unit and name.endswith("_a")):
            assert_near(parameter.grad, theirs[f"base_model.model.0.{name}"], "gradient")
    assert_near(x.grad, x_peft.grad, "gradient")


@every_form
@pytest.mark.parametrize("dims", CLASSES)
@pytest.mark.parametrize("layer", [*KEPT, *LOST], ids=named)
def test_is_the_layer_with_its_delta_and_merges_into_it(case, dims, layer):
    """In three dimensions there is no peft; it loses the padding mode."""
    model, x = wrapped(case, dims, torch.float64, **layer), data(dims, torch.float64)
    expected = exact(model, x)
    assert_is(model, x.clone().requires_grad_(), expected, torch.float64)
    y = expected[0]
    assert_near(model(x[0]), y[0], "layer")
    model.merge_adapter()
    assert_near(model(x), y, "merged")
    model.unmerge_adapter()
    assert torch.equal(model[0].weight, net(dims, torch.float64, **layer)[0].weight)
    assert_near(pyadapt.merge(model)(x), y, "merged")


@both
def test_peft_loses_the_padding_mode(case):
    """Why the merged layer is the oracle there."""
    layer = {"padding": 1, "padding_mode": "circular"}
    model = wrapped(case, **layer)
    twin = twin_of(case, model, **layer)
    unmerged = twin(data(2))
    twin.merge_adapter()
    assert not torch.allclose(unmerged, twin(data(2)), atol=1e-3)
    assert_near(model(data(2)), twin(data(2)), "merged")


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_base(case, dtype):
    """fp32 adapters over a 16-bit layer."""
    model, x = wrapped(case, dtype=dtype), data(2, dtype).requires_grad_()
    assert_is(model, x, exact(model, x), dtype, "product")
    assert {p.grad.dtype for p in model[0].unit("default").parameters()} == {torch.float32}


@every_form
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2])
def test_rank_dropout(case, dims, groups):
    """Rows of dW; the mask in backward is that of forward."""
    for scale in [{}] if case.method == "LoHa" else [{}, {"rank_dropout_scale": True}]:
        config = {"rank_dropout": 0.4, **scale}
        model = wrapped(case, dims, torch.float64, config, groups=groups).train()
        x = data(dims, torch.float64).requires_grad_()
        torch.manual_seed(5)
        factors = model[0].unit("default").output_factors(x, 12)
        kept = factors > 0
        assert 0 < kept.sum() < 12
        divided = 12 / kept.sum() if scale or case.method == "LoHa" else 1.0
        assert torch.equal(factors, kept * divided)
        expected = exact(model, x, factors=factors)
        torch.manual_seed(5)
        assert_is(model, x, expected, torch.float64)


@among(SHAPES)
@pytest.mark.parametrize("dims", [1, 2])
def test_files_go_both_ways(case, dims, tmp_path):
    model, x = wrapped(case, dims), data(dims)
    model.save_pretrained(tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(net(dims), tmp_path / "ours")
    if (dims, str(case)) not in PEFT_IS_WRONG:
        assert_near(twin(x), model(x), "merged" if case.method == "LoKr" else "layer")
    twin.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert torch.equal(pyadapt.load(net(dims), tmp_path / "theirs")(x), model(x))


@both
@pytest.mark.parametrize("effective", [False, True], ids=["flat", "effective"])
def test_hotswap_to_a_lower_rank(case, effective, tmp_path):
    config = {"use_effective_conv2d": effective, "r": 3}
    if case.method == "LoKr":
        config["decompose_factor"] = 1
    other = wrapped(case, config={**config, "r": 2, "alpha": 9})
    other.save_pretrained(tmp_path)
    model = wrapped(case, config=config)
    assert model.hotswap_adapter(tmp_path)
    assert_near(model(data(2)), other(data(2)), "merged")


@pytest.mark.parametrize(
    ("case", "other"), [(EFFECTIVE, {"r": 3, "use_effective_conv2d": False}), (LOKR_CONVS[1], {"r": 6})], ids=str,
    indirect=["case"],
)  # fmt: skip
def test_several_adapters_and_rows(case, other):
    """The second has another form."""
    model = wrapped(case, dtype=torch.float64)
    model.add_adapter("second", case.config(**other))
    x = data(2, torch.float64, rows=3)
    plain, first = net(2, torch.float64)(x), model(x)
    mixed = model(x, adapter_names=["second", "__base__", "default"])
    model.set_adapter("second")
    second = model(x)
    assert_near(mixed, torch.stack([second[0], plain[1], first[2]]), "layer")
    model.set_adapter(["default", "second"])
    together = model(x)
    assert_near(together - plain, first + second - 2 * plain, "merged")
    model.merge_adapter()
    assert_near(model(x), together, "merged")


@every_form
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.0), (torch.bfloat16, 0.25)], ids=str)
def test_compiles_in_one_piece(case, dtype, p):
    model = wrapped(case, 2, dtype, {"rank_dropout": p}, padding=1, padding_mode="circular").train()
    x, eager = data(2, dtype), copy.deepcopy(model)
    for which in (torch.compile(model, fullgraph=True, backend="aot_eager"), eager):
        torch.manual_seed(1)
        which(x).float().square().sum().backward()
    grads = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model[0].unit("default").parameters()))
    for name, gradient in grads.items():
        assert_close(model.get_parameter(name).grad, gradient.double(), "gradient", dtype)


@every_form
def test_autocast(case):
    model = wrapped(case)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(data(2))
    assert y.dtype == torch.bfloat16
    assert_close(y, model(data(2)), "layer", torch.bfloat16)
