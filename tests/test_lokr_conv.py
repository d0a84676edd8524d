"""LoKr on convolutions: peft's where it keeps the layer's geometry, the merged layer in fp64 always."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from models import assert_near, copy_adapter_to_peft
from safetensors.torch import load_file
from tolerance import assert_close
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import pyadapt
from pyadapt import LoKrConfig

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (9, 7), 3: (5, 6, 4)}
KEPT = [{}, {"stride": 2}, {"padding": 1}, {"padding": "same"}, {"kernel_size": 1}, {"bias": False}]
KEPT += [{"dilation": 2, "padding": 2}, {"groups": 2}, {"groups": 2, "stride": 2, "padding": 1, "kernel_size": 2}]
LOST = [{"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")]
LOST += [{"padding": "same", "padding_mode": "reflect", "dilation": 2}]
# From 8 to 12 channels. With a factor of 2 these are 2 * 4 and 2 * 6, so that a rank of 2 splits w2; else 2 * 4 and
# 3 * 4, where a rank of 1 does. (At rank 1 PEFT's effective form fails where a side of the kernel is 1, as in Conv1d.)
FORMS = {
    "split": {"r": 1},
    "effective": {"r": 2, "decompose_factor": 2, "use_effective_conv2d": True},
    "full": {"r": 3, "use_effective_conv2d": True},
    "both split": {"r": 1, "decompose_both": True},
    "factor 2": {"r": 2, "decompose_factor": 2},
}
every_form = pytest.mark.parametrize("form", FORMS)


def named(case):
    return "-".join(f"{key}={value}" for key, value in case.items()) or "plain"


def net(dims, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return nn.Sequential(CLASSES[dims](8, 12, **{"kernel_size": 3, **options})).to(dtype).eval()


def data(dims, dtype=torch.float32, rows=2):
    return torch.randn(rows, 8, *SIZES[dims], dtype=dtype, generator=torch.Generator().manual_seed(3))


def config_of(form, **config):
    return {"alpha": 3, "init_weights": False, "target_modules": ["0"], **FORMS[form], **config}


def wrapped(dims, form="split", dtype=torch.float32, config=(), **options):
    return pyadapt.wrap(net(dims, dtype, **options), LoKrConfig(**config_of(form, **dict(config))))


def twin_of(model, dims, form="split", **options):
    twin = peft.get_peft_model(net(dims, **options), peft.LoKrConfig(**config_of(form)))
    copy_adapter_to_peft(model, twin)
    return twin.train(model.training)


def delta(layer, name="default"):
    """dW in fp64 by the definition, in the layer's shape: a loop over what kron and a product mean."""
    unit = layer.unit(name)
    values = {key: value.detach().double() for key, value in unit.named_parameters()}
    w1 = values.get("lokr_w1")
    w1 = values["lokr_w1_a"] @ values["lokr_w1_b"] if w1 is None else w1
    if "lokr_w2" in values:
        w2 = values["lokr_w2"].flatten(2)
    elif "lokr_t2" in values:
        t2 = values["lokr_t2"].flatten(2)
        w2 = torch.einsum("ijs,iq,jk->qks", t2, values["lokr_w2_a"], values["lokr_w2_b"])
    else:
        w2 = values["lokr_w2_a"] @ values["lokr_w2_b"]
        w2 = w2.view(w2.shape[0], -1, layer.weight[0, 0].numel())
    dW = torch.einsum("pi,qks->pqiks", w1, w2)
    return unit.scaling * dW.reshape(layer.weight.shape)


def exact_net(model, dims, **options):
    """The plain fp64 layer with dW in its weight."""
    exact = net(dims, torch.float64, **options)
    with torch.no_grad():
        exact[0].weight.copy_(model[0].weight.double() + delta(model[0]))
    return exact


# All that peft has, but for one that it has wrong: see test_peft_has_another_product_there.
OF_PEFT = [(dims, form) for dims in (1, 2) for form in FORMS if (dims, form) != (1, "full")]
of_peft = pytest.mark.parametrize(("dims", "form"), OF_PEFT)


@every_form
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("init_weights", [True, False, "lycoris"])
def test_the_same_seed_gives_the_start_of_peft(dims, form, init_weights):
    config = config_of(form, init_weights=init_weights)
    plain = net(dims)
    torch.manual_seed(4)
    twin = peft.get_peft_model(copy.deepcopy(plain), peft.LoKrConfig(**config))
    torch.manual_seed(4)
    model = pyadapt.wrap(plain, LoKrConfig(**config))
    theirs = peft.get_peft_model_state_dict(twin)
    ours = model.get_adapter_state_dict()
    assert len(ours) == len(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[f"base_model.model.{key}"]), key
    assert torch.equal(model(data(dims)), net(dims)(data(dims))) is (init_weights is not False)


@of_peft
@pytest.mark.parametrize("case", KEPT, ids=named)
def test_values_and_gradients_are_those_of_peft(dims, case, form):
    model = wrapped(dims, form, **case)
    twin = twin_of(model, dims, form, **case)
    x, x_peft = data(dims).requires_grad_(), data(dims).requires_grad_()
    y, expected = model(x), twin(x_peft)
    assert_near(y, expected, "merged")
    y.square().sum().backward()
    expected.square().sum().backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in twin.named_parameters()}
    for name, parameter in model[0].unit("default").named_parameters():
        assert_near(parameter.grad, theirs[f"base_model.model.0.{name}"], "gradient")
    assert_near(x.grad, x_peft.grad, "gradient")
    assert model[0].weight.grad is None


@every_form
@pytest.mark.parametrize("dims", CLASSES)
@pytest.mark.parametrize("case", [*KEPT, *LOST], ids=named)
def test_is_the_layer_with_its_delta_and_merges_into_it(dims, case, form):
    """In three dimensions there is no peft; it loses the padding mode."""
    model = wrapped(dims, form, torch.float64, **case)
    x = data(dims, torch.float64)
    expected = exact_net(model, dims, **case)(x)
    assert_near(model(x), expected, "layer")
    assert_near(model(x[0]), expected[0], "layer")
    model.merge_adapter()
    assert_near(model(x), expected, "merged")
    model.unmerge_adapter()
    assert torch.equal(model[0].weight, net(dims, torch.float64, **case)[0].weight)
    assert_near(pyadapt.merge(model)(x), expected, "merged")


def test_peft_has_another_product_there():
    """Conv1d with a full w2: peft lines up w1 with the last two dimensions of w2, the kernel for the channels."""
    model = wrapped(1, "full")
    twin = twin_of(model, 1, "full")
    theirs = twin.base_model.model[0].get_delta_weight("default")
    assert not torch.allclose(theirs.double(), delta(model[0]), atol=1e-3)
    w1, w2 = model[0].unit("default").lokr_w1, model[0].unit("default").lokr_w2
    assert_near(theirs, torch.kron(w1, w2).reshape(theirs.shape), "layer")


def test_peft_loses_the_padding_mode():
    """Why the merged layer is the oracle there."""
    options = {"padding": 1, "padding_mode": "circular"}
    model = wrapped(2, **options)
    twin = twin_of(model, 2, **options)
    unmerged = twin(data(2))
    twin.merge_adapter()
    assert not torch.allclose(unmerged, twin(data(2)), atol=1e-3)
    assert_near(model(data(2)), twin(data(2)), "merged")


@every_form
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2])
def test_gradcheck(dims, form, groups):
    model = wrapped(dims, form, torch.float64, config={"rank_dropout": 0.4}, groups=groups).train()
    x = data(dims, torch.float64, rows=1)[..., :4].clone().requires_grad_()
    unit = dict(model[0].unit("default").named_parameters())

    def run(x, *values):
        torch.manual_seed(5)
        values = {f"0.adapters.default.{name}": value for name, value in zip(unit, values, strict=True)}
        return torch.func.functional_call(model, values, (x,))

    assert torch.autograd.gradcheck(run, (x, *unit.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_form
def test_16_bit_base(dtype, form):
    """fp32 adapters over a 16-bit layer: the term is computed in fp32 and rounded once."""
    model = wrapped(2, form, dtype)
    x = data(2, dtype).requires_grad_()
    y = model(x)
    assert y.dtype == dtype
    exact = exact_net(model, 2)
    with torch.no_grad():
        exact[0].bias.copy_(model[0].bias)
    x64 = x.detach().double().requires_grad_()
    expected = exact(x64)
    assert_close(y, expected, "product", dtype)
    y.float().sum().backward()
    expected.sum().backward()
    assert_close(x.grad, x64.grad, "product", dtype)
    assert {p.grad.dtype for p in model[0].unit("default").parameters()} == {torch.float32}


@pytest.mark.parametrize("dims", [1, 2])
@every_form
def test_files_go_both_ways(dims, form, tmp_path):
    model = wrapped(dims, form)
    x = data(dims)
    model.save_pretrained(tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(net(dims), tmp_path / "ours")
    if (dims, form) in OF_PEFT:
        assert_near(twin(x), model(x), "merged")
    twin.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert torch.equal(pyadapt.load(net(dims), tmp_path / "theirs")(x), model(x))


@pytest.mark.parametrize("effective", [False, True], ids=["flat", "effective"])
def test_hotswap_to_a_lower_rank(effective, tmp_path):
    config = {"use_effective_conv2d": effective, "decompose_factor": 1}
    other = wrapped(2, config={**config, "r": 2, "alpha": 5})
    other.save_pretrained(tmp_path)
    model = wrapped(2, config={**config, "r": 3})
    assert model.hotswap_adapter(tmp_path)
    assert_near(model(data(2)), other(data(2)), "merged")


def test_shapes_and_route_are_planned():
    config = LoKrConfig(target_modules=["0", "1", "2", "3"], r=1, use_effective_conv2d=True)
    layers = nn.Conv1d(8, 12, 3), nn.Conv2d(8, 12, (1, 3), groups=2), nn.Conv2d(8, 12, 1), nn.Conv3d(8, 12, 3)
    rows = pyadapt.plan(nn.Sequential(*layers), config).layers
    assert rows[0].shapes == {"lokr_w1": (3, 2), "lokr_w2_a": (1, 4), "lokr_w2_b": (1, 4), "lokr_t2": (1, 1, 3, 1)}
    assert rows[1].shapes == {"lokr_w1": (3, 2), "lokr_w2_a": (1, 4), "lokr_w2_b": (1, 2), "lokr_t2": (1, 1, 1, 3)}
    # One place: nothing to take apart; nor in three dimensions, which PEFT has not.
    assert rows[2].shapes == {"lokr_w1": (3, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)}
    assert rows[3].shapes == {"lokr_w1": (3, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4 * 27)}
    factored, dense = "kronecker, convolutions", "convolution with dW"
    assert [row.kernel for row in rows] == [factored, dense, factored, factored]
    # Nothing to save where w1 is one number.
    (row,) = pyadapt.plan(nn.Sequential(nn.Conv2d(3, 5, 3)), LoKrConfig(target_modules=["0"])).layers
    assert row.kernel == dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_form
@pytest.mark.parametrize("groups", [1, 2])
def test_neither_a_cast_input_nor_dW_is_kept(dtype, form, groups):
    """In fp32 U and V are, h values for each of the c and of the a parts of a place; else nothing but x."""
    model = wrapped(2, form, dtype, groups=groups).train()
    x, storages = torch.randn(4, 8, 16, 16).to(dtype).requires_grad_(), {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    known = {x.data_ptr(), *(p.data_ptr() for p in model.parameters())}
    beside = sum(size for place, size in storages.items() if place not in known)
    unit = model[0].unit("default")
    w1, down, up = unit.factors()
    hidden = down.shape[0] * (w1.shape[1] + (w1.shape[0] if up is not None else 0)) * 4 * 14 * 14 * 4
    # What is made of the factors, and copies in which they are multiplied: nothing that grows with x.
    made = 2 * 4 * sum(factor.numel() for factor in (w1, down, up, *unit.parameters()) if factor is not None)
    assert beside <= (hidden if dtype == torch.float32 and groups == 1 else 0) + made


@pytest.mark.parametrize("scale", [False, True])
def test_rank_dropout(scale):
    model = wrapped(2, "split", torch.float64, {"rank_dropout": 0.4, "rank_dropout_scale": scale}).train()
    x = data(2, torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        term = model(x) - model[0].frozen(x)
        full = model.eval()(x) - model[0].frozen(x)
    alive = term.abs().amax((0, 2, 3)) > 1e-9
    assert 0 < alive.sum() < 12
    factors = alive * (12 / alive.sum() if scale else 1)
    assert_near(term, full * factors[:, None, None], "gradient")


def test_several_adapters_and_rows():
    model = wrapped(2, "effective", torch.float64)
    model.add_adapter("second", LoKrConfig(**config_of("full")))
    x = data(2, torch.float64, rows=3)
    plain, first = net(2, torch.float64)(x), model(x)
    mixed = model(x, adapter_names=["second", "__base__", "default"])
    model.set_adapter("second")
    second = model(x)
    assert_near(mixed, torch.stack([second[0], plain[1], first[2]]), "layer")
    model.set_adapter(["default", "second"])
    both = model(x)
    assert_near(both - plain, first + second - 2 * plain, "merged")
    model.merge_adapter()
    assert_near(model(x), both, "merged")


@pytest.mark.parametrize("options", [{}, {"rank_dropout": 0.25}], ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_form
def test_compiles_in_one_piece(dtype, options, form):
    model = wrapped(2, form, dtype, config=options, padding=1, padding_mode="circular").train()
    x, eager = data(2, dtype), copy.deepcopy(model)
    for which in (torch.compile(model, fullgraph=True, backend="aot_eager"), eager):
        torch.manual_seed(1)
        which(x).float().square().sum().backward()
    grads = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model[0].unit("default").parameters()))
    for name, gradient in grads.items():
        assert_close(model.get_parameter(name).grad, gradient.double(), "gradient", dtype)


@every_form
def test_autocast(form):
    model, exact = wrapped(2, form), wrapped(2, form)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(data(2))
    assert y.dtype == torch.bfloat16
    assert_close(y, exact(data(2)), "layer", torch.bfloat16)
