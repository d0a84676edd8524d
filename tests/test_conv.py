"""LoRA on convolutions, against peft where it keeps the layer's geometry; always against the merged layer in fp64."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from models import copy_adapter_to_peft, snapshot
from safetensors.torch import load_file
from tolerance import assert_close, assert_near
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import pyadapt
from pyadapt import LoraConfig

# peft takes the bias of B for an unsharded leftover.
pytestmark = pytest.mark.filterwarnings(r"ignore:Adapter 'default'. 1 LoRA tensor\(s\) have invalid shape")

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (9, 7), 3: (5, 6, 4)}
# What peft's A convolution takes over from the layer, and what it loses.
KEPT = [{}, {"stride": 2}, {"padding": 1}, {"stride": 2, "padding": 1, "kernel_size": 2}, {"padding": "same"}]
KEPT += [{"kernel_size": 1}, {"bias": False}]
LOST = [{"dilation": 2, "padding": 2}, {"dilation": 2, "padding": "same"}]
LOST += [{"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")]
LOST += [{"padding": "same", "padding_mode": "reflect", "kernel_size": 2, "dilation": 2}]


def geometry(case):
    return "-".join(f"{key}={value}" for key, value in case.items()) or "plain"


def net(dims, dtype=torch.float32, **options):
    """One convolution between 4 and 6 channels."""
    torch.manual_seed(0)
    options = {"kernel_size": 3, **options}
    return nn.Sequential(CLASSES[dims](4, 6, **options)).to(dtype).eval()


def data(dims, dtype=torch.float32, rows=2):
    return torch.randn(rows, 4, *SIZES[dims], dtype=dtype, generator=torch.Generator().manual_seed(3))


def wrapped(dims, dtype=torch.float32, config=(), **options):
    config = {"target_modules": ["0"], "r": 2, "lora_alpha": 3, "init_lora_weights": False, **dict(config)}
    return pyadapt.wrap(net(dims, dtype, **options), LoraConfig(**config))


def twin_of(model, dims, config=(), **options):
    config = {"target_modules": ["0"], "r": 2, "lora_alpha": 3, **dict(config)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
        twin = peft.get_peft_model(net(dims, **options), peft.LoraConfig(**config))
    copy_adapter_to_peft(model, twin)
    return twin.train(model.training)


@pytest.mark.parametrize("dims", CLASSES)
@pytest.mark.parametrize("case", [*KEPT, {"groups": 2}, {"groups": 2, "stride": 2, "padding": 1}], ids=geometry)
def test_values_and_gradients_are_those_of_peft(dims, case):
    model = wrapped(dims, **case)
    twin = twin_of(model, dims, **case)
    x, x_peft = data(dims).requires_grad_(), data(dims).requires_grad_()
    y, expected = model(x), twin(x_peft)
    assert_near(y, expected, "layer")
    y.square().sum().backward()
    expected.square().sum().backward()
    unit, theirs = model[0].adapters["default"], twin.base_model.model[0]
    assert_near(unit.lora_A.grad, theirs.lora_A["default"].weight.grad, "gradient")
    assert_near(unit.lora_B.grad, theirs.lora_B["default"].weight.grad, "gradient")
    assert_near(x.grad, x_peft.grad, "gradient")
    assert model[0].weight.grad is None
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("dims", CLASSES)
@pytest.mark.parametrize("case", [*KEPT, *LOST], ids=geometry)
def test_merged_is_unmerged(dims, case):
    """In fp64: for dilation and padding mode the merged layer is the oracle, since peft loses both."""
    model = wrapped(dims, torch.float64, **case)
    x = data(dims, torch.float64)
    before, plain = model(x), net(dims, torch.float64, **case)(x)
    assert not torch.allclose(before, plain)
    model.merge_adapter()
    assert_near(model(x), before, "merged")
    model.unmerge_adapter()
    assert torch.equal(model[0].weight, net(dims, torch.float64, **case)[0].weight)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    merged = pyadapt.merge(model)
    assert type(merged[0]) is CLASSES[dims]
    assert_near(merged(x), before, "merged")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths and odd dilation")
@pytest.mark.parametrize("case", LOST, ids=geometry)
def test_peft_loses_dilation_and_padding_mode(case):
    """Why the merged layer is the oracle there: peft's own unmerged output is not that of its merged layer."""
    model = wrapped(2, **case)
    twin = twin_of(model, 2, **case)
    if case.get("dilation") and case["padding"] != "same":
        with pytest.raises(RuntimeError, match="must match the size"):
            twin(data(2))
        return
    unmerged = twin(data(2))
    twin.merge_adapter()
    assert not torch.allclose(unmerged, twin(data(2)), atol=1e-3)
    assert_near(twin(data(2)), model(data(2)), "merged")


@pytest.mark.parametrize("dims", CLASSES)
def test_groups_cannot_be_merged(dims, tmp_path):
    """The term reads every input channel, so that no weight of the layer's shape holds it: peft refuses as well."""
    model = wrapped(dims, groups=2)
    before = snapshot(model)
    for attempt in (model.merge_adapter, lambda: pyadapt.merge(model), lambda: pyadapt.export(model, tmp_path / "out")):
        with pytest.raises(ValueError, match="2 groups cannot be merged"):
            attempt()
    assert snapshot(model) == before
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotImplementedError):
        twin_of(model, dims, groups=2).merge_adapter()
    # An input channel of the other group moves the output, as it does in peft and as it does not in the layer itself.
    x = data(dims)
    moved = x.clone()
    moved[:, 3] += 1
    assert not torch.allclose(model(moved)[:, :3], model(x)[:, :3])
    with model.disable_adapter():
        assert torch.equal(model(moved)[:, :3], model(x)[:, :3])


def test_rank_that_groups_do_not_divide():
    model = net(2, groups=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0 \(Conv2d\): r=3 cannot be divided among the 2 groups"):
        pyadapt.wrap(model, LoraConfig(target_modules=["0"], r=3))
    assert snapshot(model) == before


@pytest.mark.parametrize("dims", CLASSES)
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_rslora": True}], ids=geometry)
def test_files_go_both_ways(dims, options, tmp_path):
    model = wrapped(dims, config=options)
    if options.get("lora_bias"):
        with torch.no_grad():
            model[0].adapters["default"].lora_bias.normal_()
    x = data(dims)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(dims), tmp_path / "ours")
    assert_near(theirs(x), model(x), "layer")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in again.items()}
    loaded = pyadapt.load(net(dims), tmp_path / "theirs")
    assert torch.equal(loaded(x), model(x))


def test_bias_of_B_is_folded_with_the_scaling():
    """peft's unmerged output is the oracle."""
    model = wrapped(2, torch.float64, config={"lora_bias": True, "lora_alpha": 6})
    with torch.no_grad():
        model[0].adapters["default"].lora_bias.normal_()
    x = data(2, torch.float64)
    expected = model(x)
    theirs = twin_of(model.float(), 2, config={"lora_bias": True, "lora_alpha": 6})
    assert_near(expected.float(), theirs(x.float()), "layer")
    model = model.double()
    expected = model(x)
    model.merge_adapter()
    assert_near(model(x), expected, "merged")


def test_several_adapters_add_up():
    model = wrapped(2, torch.float64)
    model.add_adapter("second", LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    x = data(2, torch.float64)
    plain = net(2, torch.float64)(x)
    first = model(x)
    model.set_adapter("second")
    second = model(x)
    model.set_adapter(["default", "second"])
    both = model(x)
    assert_near(both - plain, first + second - 2 * plain, "merged")
    model.merge_adapter()
    assert_near(model(x), both, "merged")


def test_each_row_its_adapter():
    model = wrapped(2)
    model.add_adapter("second", LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    x = data(2, rows=3)
    mixed = model(x, adapter_names=["second", "__base__", "default"])
    assert_near(mixed[2:], model(x[2:]), "layer")
    model.set_adapter("second")
    assert_near(mixed[:1], model(x[:1]), "layer")
    assert_near(mixed[1:2], net(2)(x[1:2]), "layer")


@pytest.mark.parametrize("case", [{}, {"padding": 1, "padding_mode": "circular"}], ids=geometry)
def test_without_a_batch(case):
    model = wrapped(2, **case)
    x = data(2)
    assert_near(model(x[0]), model(x)[0], "layer")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_base(dtype):
    """fp32 adapters over a 16-bit layer: the term is computed in fp32 and rounded once."""
    model = wrapped(2, dtype)
    assert model[0].adapters["default"].lora_A.dtype == torch.float32
    x = data(2, dtype)
    exact = copy.deepcopy(model).double()
    assert model(x).dtype == dtype
    assert_close(model(x), exact(x.double()), "product", dtype)


def saved_bytes(call):
    """Bytes of the storages that autograd keeps of `call`, each once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    return y, storages


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}], ids=geometry)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_kept_once(dtype, options):
    """Neither a cast copy nor a dropped one nor a mask: x, the weights, and the r hidden channels."""
    model = wrapped(2, dtype, config=options).train()
    x = torch.randn(4, 4, 16, 16).to(dtype).requires_grad_()
    _, storages = saved_bytes(lambda: model(x))
    unit = model[0].adapters["default"]
    known = [x, model[0].weight, unit.lora_A, unit.lora_B]
    hidden = 4 * 2 * 14 * 14 * 4
    beside = sum(size for place, size in storages.items() if place not in {t.data_ptr() for t in known})
    assert x.data_ptr() in storages
    # The hidden channels, and the random state where there is dropout.
    assert beside <= hidden + (8192 if options else 0)


def test_dropout():
    """The mask in backward is that of forward: gradient checking holds with the seed fixed."""
    model = wrapped(2, torch.float64, config={"lora_dropout": 0.4}).train()
    x = data(2, torch.float64).requires_grad_()
    unit = model[0].adapters["default"]

    def run(x, A, B):
        torch.manual_seed(5)
        return torch.func.functional_call(model, {"0.adapters.default.lora_A": A, "0.adapters.default.lora_B": B}, (x,))

    assert torch.autograd.gradcheck(run, (x, unit.lora_A, unit.lora_B))
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    torch.manual_seed(0)
    many = torch.stack([model.train()(x).detach() for _ in range(2000)])
    mean, spread = many.mean(0), many.std(0) / 2000**0.5
    assert ((mean - model.eval()(x)).abs() <= 5 * spread + 1e-9).all()


def test_the_own_bias_gets_a_gradient_if_it_is_trained():
    model = wrapped(2)
    model[0].bias.requires_grad_(True)
    model(data(2)).sum().backward()
    assert_near(model[0].bias.grad, torch.full((6,), 2.0 * 7 * 5), "gradient")


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.25}], ids=geometry)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_piece(dtype, options):
    model = wrapped(2, dtype, config=options, padding=1, padding_mode="circular")
    model.train(bool(options))
    x = data(2, dtype)
    torch.manual_seed(1)
    expected = model(x)
    expected.float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    y = compiled(x)
    y.float().square().sum().backward()
    assert len(grads) == 2
    if not options:
        assert_near(y, expected, "layer")
        for name, parameter in model.named_parameters():
            if name in grads:
                assert_close(parameter.grad, grads[name].double(), "gradient", dtype)


def test_transposed_and_changed_convolutions_are_no_targets():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    for layer in (nn.ConvTranspose2d(4, 6, 3), Standardised(4, 6, 3)):
        with pytest.raises(ValueError, match=f"'0' is a {type(layer).__name__}, which no adapter can be put on"):
            pyadapt.wrap(nn.Sequential(layer), LoraConfig(target_modules=["0"]))


def test_all_linear_takes_no_convolution():
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Flatten(), nn.Linear(54, 5), nn.Embedding(5, 5), nn.Linear(5, 2))
    plan = pyadapt.plan(model, LoraConfig(target_modules="all-linear"))
    assert [row.path for row in plan.layers] == ["2", "4"]


def test_plan():
    plan = pyadapt.plan(net(2, groups=2), LoraConfig(target_modules=["0"], r=4, lora_bias=True))
    (row,) = plan.layers
    assert (row.base, row.out_features, row.in_features, row.rank) == ("conv", 6, 18, 4)
    shapes = {"lora_A.weight": (4, 4, 3, 3), "lora_B.weight": (6, 2, 1, 1), "lora_B.bias": (6,)}
    assert row.shapes == shapes
    assert row.parameters == 144 + 12 + 6


def test_a_model_with_a_patch_convolution(tmp_path):
    """ViT's patches: convolution and linear layers in one adapter, exported and read back."""
    from models import build, model_batch

    model = build("vit")
    pyadapt.wrap(model, LoraConfig(target_modules=["projection", "q_proj"], r=4, init_lora_weights=False))
    batch = model_batch("vit")
    expected = model(**batch).logits
    pyadapt.export(model, tmp_path)
    again = type(build("vit")).from_pretrained(tmp_path).eval()
    assert_near(again(**batch).logits, expected, "merged")
