"""LoHa on convolutions: peft's where it keeps the layer's geometry, the merged layer in fp64 always."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from models import assert_near, copy_adapter_to_peft, snapshot
from safetensors.torch import load_file
from tolerance import assert_close
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import pyadapt
from pyadapt import LoHaConfig
from pyadapt.methods.lycoris import loha_conv

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (9, 7), 3: (5, 6, 4)}
KEPT = [{}, {"stride": 2}, {"padding": 1}, {"padding": "same"}, {"kernel_size": 1}, {"bias": False}]
KEPT += [{"dilation": 2, "padding": 2}, {"groups": 2}, {"groups": 2, "stride": 2, "padding": 1, "kernel_size": 2}]
LOST = [{"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")]
LOST += [{"padding": "same", "padding_mode": "reflect", "dilation": 2}]


def named(case):
    return "-".join(f"{key}={value}" for key, value in case.items()) or "plain"


@pytest.fixture(params=["khatri-rao", "with dW"])
def form(request, monkeypatch):
    """Which form serves; a grouped convolution has one only."""
    monkeypatch.setattr(loha_conv, "is_low_rank", lambda *case: request.param == "khatri-rao" and case[-1] == 1)


effective = pytest.mark.parametrize("effective", [False, True], ids=["flat", "effective"])


def net(dims, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return nn.Sequential(CLASSES[dims](4, 6, **{"kernel_size": 3, **options})).to(dtype).eval()


def data(dims, dtype=torch.float32, rows=2):
    return torch.randn(rows, 4, *SIZES[dims], dtype=dtype, generator=torch.Generator().manual_seed(3))


def config_of(effective=False, **config):
    config = {"r": 2, "alpha": 3, "init_weights": False, "use_effective_conv2d": effective, **config}
    return {"target_modules": ["0"], **config}


def wrapped(dims, effective=False, dtype=torch.float32, config=(), **options):
    return pyadapt.wrap(net(dims, dtype, **options), LoHaConfig(**config_of(effective, **dict(config))))


def twin_of(model, dims, effective=False, **options):
    twin = peft.get_peft_model(net(dims, **options), peft.LoHaConfig(**config_of(effective)))
    copy_adapter_to_peft(model, twin)
    return twin.train(model.training)


def delta(layer, values=None):
    """dW in fp64 by the definition, in the layer's shape, of the unit's values or of others."""
    unit, products = layer.unit("default"), []
    values = values or {name: value.detach().double() for name, value in unit.named_parameters()}
    for i in (1, 2):
        a, b, t = (values.get(f"hada_{name}") for name in (f"w{i}_a", f"w{i}_b", f"t{i}"))
        products.append(a @ b if t is None else torch.einsum("ijkl,jc,io->ockl", t, b, a))
    return unit.scaling * (products[0] * products[1]).reshape(layer.weight.shape)


def exact_gradients(model, x, **options):
    """Of sum(y^2), in fp64 by autograd through the definition."""
    named = model[0].unit("default").named_parameters()
    values = {name: value.detach().double().requires_grad_() for name, value in named}
    weight = model[0].weight.detach().double() + delta(model[0], values)
    layer = net(x.dim() - 2, torch.float64, **options)
    y = torch.func.functional_call(layer, {"0.weight": weight}, (x.detach().double(),))
    return dict(zip(values, torch.autograd.grad(y.square().sum(), list(values.values())), strict=True))


def exact_net(model, dims, **options):
    """The plain fp64 layer with dW in its weight."""
    exact = net(dims, torch.float64, **options)
    with torch.no_grad():
        exact[0].weight.copy_(model[0].weight.double() + delta(model[0]))
    return exact


@effective
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("init_weights", [True, False])
def test_the_same_seed_gives_the_start_of_peft(dims, effective, init_weights):
    torch.manual_seed(4)
    plain = net(dims)
    torch.manual_seed(4)
    twin = peft.get_peft_model(copy.deepcopy(plain), peft.LoHaConfig(**config_of(effective, init_weights=init_weights)))
    torch.manual_seed(4)
    model = pyadapt.wrap(plain, LoHaConfig(**config_of(effective, init_weights=init_weights)))
    theirs = peft.get_peft_model_state_dict(twin)
    ours = model.get_adapter_state_dict()
    assert len(ours) == (6 if effective else 4)
    for key, value in ours.items():
        assert torch.equal(value, theirs[f"base_model.model.{key}"]), key
    assert torch.equal(model(data(dims)), net(dims)(data(dims))) is init_weights


@effective
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("case", KEPT, ids=named)
def test_values_and_gradients_are_those_of_peft(dims, case, effective, form):
    model = wrapped(dims, effective, **case)
    twin = twin_of(model, dims, effective, **case)
    x, x_peft = data(dims).requires_grad_(), data(dims).requires_grad_()
    y, expected = model(x), twin(x_peft)
    assert_near(y, expected, "layer")
    y.square().sum().backward()
    expected.square().sum().backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in twin.named_parameters()}
    exact = exact_gradients(model, x, **case)
    for name, parameter in model[0].unit("default").named_parameters():
        assert_near(parameter.grad, exact[name].float(), "gradient")
        if not (effective and name.endswith("_a") and case != {"kernel_size": 1}):
            assert_near(parameter.grad, theirs[f"base_model.model.0.{name}"], "gradient")
    assert_near(x.grad, x_peft.grad, "gradient")
    assert model[0].weight.grad is None


@effective
@pytest.mark.parametrize("dims", CLASSES)
@pytest.mark.parametrize("case", [*KEPT, *LOST], ids=named)
def test_is_the_layer_with_its_delta_and_merges_into_it(dims, case, effective, form):
    """In three dimensions there is no peft; it loses the padding mode."""
    model = wrapped(dims, effective, torch.float64, **case)
    x = data(dims, torch.float64)
    expected = exact_net(model, dims, **case)(x)
    assert_near(model(x), expected, "layer")
    assert_near(model(x[0]), expected[0], "layer")
    model.merge_adapter()
    assert_near(model(x), expected, "merged")
    model.unmerge_adapter()
    assert torch.equal(model[0].weight, net(dims, torch.float64, **case)[0].weight)
    assert_near(pyadapt.merge(model)(x), expected, "merged")


def test_peft_mixes_up_the_gradients_of_the_effective_form():
    """Why its gradients of w*_a are no oracle there: in its backward each gets the other's t and w_b."""
    model = wrapped(2, True)
    twin = twin_of(model, 2, True)
    model(data(2)).square().sum().backward()
    twin(data(2)).square().sum().backward()
    ours = model[0].unit("default").hada_w1_a.grad
    assert not torch.allclose(twin.base_model.model[0].hada_w1_a["default"].grad, ours, atol=1e-3)
    assert_near(ours, exact_gradients(model, data(2))["hada_w1_a"].float(), "gradient")


def test_peft_loses_the_padding_mode():
    """Why the merged layer is the oracle there."""
    options = {"padding": 1, "padding_mode": "circular"}
    model = wrapped(2, **options)
    twin = twin_of(model, 2, **options)
    unmerged = twin(data(2))
    twin.merge_adapter()
    assert not torch.allclose(unmerged, twin(data(2)), atol=1e-3)
    assert_near(model(data(2)), twin(data(2)), "merged")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@effective
def test_16_bit_base(dtype, effective, form):
    model = wrapped(2, effective, dtype)
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
@effective
def test_files_go_both_ways(dims, effective, tmp_path):
    model = wrapped(dims, effective)
    x = data(dims)
    model.save_pretrained(tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(net(dims), tmp_path / "ours")
    assert_near(twin(x), model(x), "layer")
    twin.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert torch.equal(pyadapt.load(net(dims), tmp_path / "theirs")(x), model(x))


@effective
def test_hotswap_to_a_lower_rank(effective, tmp_path):
    other = wrapped(2, effective, config={"r": 1, "alpha": 5})
    other.save_pretrained(tmp_path)
    model = wrapped(2, effective)
    assert model.hotswap_adapter(tmp_path)
    assert_near(model(data(2)), other(data(2)), "layer")


def test_shapes_and_route_are_planned():
    config = LoHaConfig(**config_of(True, target_modules=["0", "1", "2"], r=3))
    small = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (1, 3), groups=2), nn.Conv2d(4, 6, 1))
    rows = pyadapt.plan(small, config).layers
    assert rows[0].shapes["hada_t1"] == (3, 3, 3, 1)
    assert rows[1].shapes["hada_t2"] == (3, 3, 1, 3)
    assert rows[1].shapes["hada_w1_b"] == (3, 2)
    assert rows[1].shapes["hada_w1_a"] == (3, 6)
    # One place: nothing to take apart.
    assert rows[2].shapes["hada_w1_a"] == (6, 3)
    assert "hada_t1" not in rows[2].shapes
    wide = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=2))
    kernels = [row.kernel for row in pyadapt.plan(wide, LoHaConfig(r=4, target_modules=["0", "1"])).layers]
    assert kernels == ["khatri-rao, convolutions", "convolution with dW"]
    assert pyadapt.plan(wide, LoHaConfig(r=16, target_modules=["0"])).layers[0].kernel == "convolution with dW"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_a_cast_input_nor_dW_is_kept(dtype, monkeypatch):
    model = wrapped(2, dtype=dtype).train()
    x = torch.randn(4, 4, 16, 16).to(dtype).requires_grad_()
    for low_rank in (True, False):
        monkeypatch.setattr(loha_conv, "is_low_rank", lambda *case, low_rank=low_rank: low_rank)
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
        known = {x.data_ptr(), *(p.data_ptr() for p in model.parameters())}
        beside = sum(size for place, size in storages.items() if place not in known)
        # r^2 hidden channels with their factors; else w1_a with the scaling in it.
        hidden = 4 * (4 * 14 * 14 + 4 * 36 + 6 * 4) * dtype.itemsize
        assert beside <= (hidden if low_rank else 0) + 6 * 2 * 4


@effective
def test_dropout(effective, form):
    """Rows of dW; the mask in backward is that of forward."""
    model = wrapped(2, effective, torch.float64, config={"rank_dropout": 0.4}).train()
    x = data(2, torch.float64).requires_grad_()
    named = dict(model[0].unit("default").named_parameters())

    def run(x, *values):
        torch.manual_seed(5)
        values = {f"0.adapters.default.{name}": value for name, value in zip(named, values, strict=True)}
        return torch.func.functional_call(model, values, (x,))

    assert torch.autograd.gradcheck(run, (x, *named.values()))
    with torch.no_grad():
        term = model(x) - model[0].frozen(x)
        full = model.eval()(x) - model[0].frozen(x)
    alive = term.abs().amax((0, 2, 3)) > 0
    assert_near(term, full * alive[:, None, None] * (6 / alive.sum().clamp(min=1)), "layer")


def test_several_adapters_and_rows():
    model = wrapped(2, True, torch.float64)
    model.add_adapter("second", LoHaConfig(**config_of(r=3)))
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
@effective
def test_compiles_in_one_piece(dtype, options, effective, form):
    model = wrapped(2, effective, dtype, config=options, padding=1, padding_mode="circular").train()
    x, grads = data(2, dtype), {}
    eager = copy.deepcopy(model)
    for which in (torch.compile(model, fullgraph=True, backend="aot_eager"), eager):
        torch.manual_seed(1)
        which(x).float().square().sum().backward()
    grads = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    assert len(grads) == (6 if effective else 4)
    for name, gradient in grads.items():
        assert_close(model.get_parameter(name).grad, gradient.double(), "gradient", dtype)


def test_autocast():
    model, exact = wrapped(2), wrapped(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(data(2))
    assert y.dtype == torch.bfloat16
    assert_close(y, exact(data(2)), "layer", torch.bfloat16)


def test_a_transposed_convolution_is_refused():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3))
    before = snapshot(model)
    with pytest.raises(ValueError, match="'0' is a ConvTranspose2d, which no adapter can be put on"):
        pyadapt.wrap(model, LoHaConfig(target_modules=["0"]))
    assert snapshot(model) == before
