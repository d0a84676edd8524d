"""DoRA: magnitude and direction of each output feature apart, against the installed peft and fp64 mathematics."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_twin, plain_module, snapshot
from peft_gradients import assert_gradients_equal
from torch import nn

import pyadapt
from pyadapt import LoraConfig
from pyadapt.files import AdapterFileError

MAGNITUDE = "lora_magnitude_vector"


class ConvNet(nn.Module):
    """Convolutions with and without a bias, one with stride and padding."""

    def __init__(self, conv=nn.Conv2d, groups=1):
        super().__init__()
        self.one = conv(3, 8, 3, stride=2, padding=1)
        self.two = conv(8, 6, 2, bias=False, groups=groups)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.two(self.one(x).tanh()).flatten(2).mean(2))


class TokenNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(19, 7, padding_idx=0)
        self.head = nn.Linear(7, 3)

    def forward(self, ids):
        return self.head(self.embed(ids))


def perturb(model, scale=0.4):
    """Move every trained value, the magnitudes by up to a third: c is then neither 1 nor alike in two rows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if MAGNITUDE in name:
                parameter.mul_(0.7 + 0.6 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.add_(scale * torch.rand_like(parameter) / 4)


def pair(model, **config):
    """`model` wrapped, and peft's twin of it with the same values."""
    config = {"use_dora": True, "init_lora_weights": False, "r": 4, "lora_alpha": 6, **config}
    twin = peft_twin(model, **config).train(model.training)
    pyadapt.wrap(model, LoraConfig(**config))
    perturb(model)
    copy_adapter_to_peft(model, twin)
    return model, twin


def family_pair(name, **config):
    return pair(build(name), task_type=FAMILIES[name].task, **config)


def logits(output):
    """The tensor of a transformers model's output, or of a plain module's."""
    return getattr(output, "logits", output)


def assert_same_step(model, twin, batch):
    ours, theirs = model(**batch), twin(**batch)
    assert_near(ours.logits, theirs.logits, "model")
    ours.loss.backward()
    theirs.loss.backward()
    assert_gradients_equal(model, twin)


# --- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_step_as_in_peft(name, use_rslora):
    model, twin = family_pair(name, use_rslora=use_rslora, target_modules=list(FAMILIES[name].targets))
    assert_same_step(model, twin, model_batch(name))


def test_the_bias_of_B_is_stretched_too():
    """fp64 mathematics: peft refuses `lora_bias` with DoRA. c multiplies all that the adapter adds."""
    model = plain_module()
    pyadapt.wrap(model, LoraConfig(use_dora=True, lora_bias=True, init_lora_weights=False, target_modules=["0"]))
    perturb(model)
    layer = model.encoder[0]
    unit = layer.adapters["default"]
    moved = layer.weight.double() + unit.delta().double()
    c = unit.lora_magnitude_vector.double() / moved.norm(dim=1)
    x = torch.randn(5, 7)
    exact = c * (x.double() @ moved.t() + unit.scaling * unit.lora_bias.double()) + layer.bias.double()
    assert_near(layer(x), exact, "layer", torch.float32)
    model.add_adapter(
        "second", LoraConfig(use_dora=True, lora_bias=True, init_lora_weights=False, target_modules=["0"])
    )
    model.set_adapter(["default", "second"])
    perturb(model)
    expected = model(x)
    assert_near(pyadapt.merge(model)(x), expected, "merged")


def test_gradient_of_the_input_as_in_peft():
    model, twin = pair(plain_module(), target_modules=["0", "2"])
    x = torch.randn(4, 7)
    gradients = []
    for one in (model, twin):
        leaf = x.clone().requires_grad_()
        one(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert_near(*gradients, "gradient")
    assert_gradients_equal(model, twin)


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora"])
def test_a_fresh_adapter_changes_nothing(init):
    model = build("gpt2")
    batch = model_batch("gpt2")
    before = model(**batch).logits
    pyadapt.wrap(model, LoraConfig(use_dora=True, init_lora_weights=init))
    assert_near(model(**batch).logits, before, "model")


def test_a_random_start_has_the_norm_of_the_moved_weight():
    """As in peft: c is 1 whatever A and B start as."""
    model = plain_module()
    layer = model.encoder[0]
    weight = layer.weight.detach().clone()
    pyadapt.wrap(model, LoraConfig(use_dora=True, init_lora_weights=False, target_modules=["0"]))
    unit = layer.adapters["default"]
    moved = weight + unit.scaling * unit.lora_B @ unit.lora_A
    assert_near(unit.lora_magnitude_vector, moved.norm(dim=1), "layer")
    assert_near(layer(torch.eye(7)) - layer.bias, moved.t(), "layer")


def test_pissa_is_dora_over_what_pissa_leaves():
    """fp64 mathematics: W - s B0 A0 is what the layer starts from, and its norm with s B A that of the whole."""
    model = plain_module()
    layer = model.encoder[0]
    pyadapt.wrap(model, LoraConfig(use_dora=True, init_lora_weights="pissa", target_modules=["0"], r=3))
    perturb(model)
    unit = layer.adapters["default"]
    moved = layer.weight.double() + unit.delta().double()
    c = unit.lora_magnitude_vector.double() / moved.norm(dim=1)
    x = torch.randn(5, 7)
    assert_near(layer(x), x.double() @ (c[:, None] * moved).t() + layer.bias.double(), "layer", torch.float32)


@pytest.mark.parametrize("quantised", [False, True])
def test_loftq_starts_at_the_norm_of_the_quantised_weight(quantised):
    config = LoraConfig(
        use_dora=True, init_lora_weights="loftq", loftq_config={"loftq_bits": 8 if quantised else 4},
        target_modules=["0"], r=3,
    )  # fmt: skip
    model = plain_module()
    pyadapt.wrap(model, config)
    layer = model.encoder[0]
    unit = layer.adapters["default"]
    moved = layer.base.matrix(layer) + unit.delta()
    assert_near(unit.lora_magnitude_vector, moved.norm(dim=1), "layer")


def test_eva_starts_at_the_norm_of_the_weight():
    """A is put in after the unit was made; B is zero, so that nothing changes."""
    model = build("llama")
    batch = {key: value for key, value in model_batch("llama").items() if key != "labels"}
    expected = model(**batch).logits
    pyadapt.wrap(model, LoraConfig(use_dora=True, init_lora_weights="eva", r=2), data=[batch])
    assert_near(model(**batch).logits, expected, "model")
    unit = model.model.layers[0].self_attn.q_proj.adapters["default"]
    assert unit.lora_A.abs().max() > 0


def test_loftq_over_int8_starts_at_the_norm_of_the_moved_weight(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    pyadapt.quantize(model)
    loftq = {"loftq_bits": 8, "original": str(tmp_path)}
    pyadapt.wrap(model, LoraConfig(use_dora=True, init_lora_weights="loftq", loftq_config=loftq, r=2))
    layer = model.model.layers[0].self_attn.q_proj
    unit = layer.adapters["default"]
    assert unit.lora_B.abs().max() > 0
    assert_near(unit.lora_magnitude_vector, (layer.base.matrix(layer) + unit.delta()).norm(dim=1), "layer")


def test_int8_weights_against_peft_over_what_they_stand_for():
    model = pyadapt.quantize(build("bert"))
    dense = build("bert")
    for path, layer in model.named_modules():
        if hasattr(layer, "weight_scale"):
            with torch.no_grad():
                dense.get_submodule(path).weight.copy_(layer.weight * layer.weight_scale.view(torch.float32)[:, None])
    config = {"use_dora": True, "init_lora_weights": False, "task_type": "SEQ_CLS", "r": 4}
    twin = peft_twin(dense, **config)
    pyadapt.wrap(model, LoraConfig(**config))
    perturb(model)
    copy_adapter_to_peft(model, twin)
    assert_same_step(model, twin, model_batch("bert"))


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_lower_precision_against_peft_in_fp32(how):
    model, twin = family_pair("bert")
    batch = model_batch("bert")
    exact = twin(**batch).logits
    if how == "bf16":
        ours = model.bfloat16()(**batch).logits
    else:
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(**batch).logits
    assert_near(ours, exact, "model", torch.bfloat16)


def test_fp64_weights():
    model, _ = pair(plain_module().double(), target_modules=["0", "2"])
    unit = model.encoder[0].adapters["default"]
    assert unit.lora_magnitude_vector.dtype == torch.float64
    x = torch.randn(4, 7, dtype=torch.float64)
    layer = model.encoder[0]
    moved = layer.weight + unit.delta()
    exact = x @ (unit.lora_magnitude_vector[:, None] * moved / moved.norm(dim=1, keepdim=True)).t() + layer.bias
    assert_near(layer(x), exact, "layer")


def test_dropout_takes_from_the_term_alone():
    """y = c (x W' + s B A drop(x)) + b with LoRA's own mask; peft drops from the frozen product as well."""
    dora, lora = plain_module(), plain_module()
    for model, use_dora in ((dora, True), (lora, False)):
        config = LoraConfig(use_dora=use_dora, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)
        torch.manual_seed(5)
        pyadapt.wrap(model, config).train()
    unit, layer = dora.encoder[0].adapters["default"], dora.encoder[0]
    with torch.no_grad():
        unit.lora_magnitude_vector.mul_(torch.rand(11) + 0.5)
    x = torch.randn(6, 7)
    torch.manual_seed(9)
    ours = layer(x)
    torch.manual_seed(9)
    undropped = lora.encoder[0](x) - layer.bias
    c = unit.lora_magnitude_vector / (layer.weight + unit.delta()).norm(dim=1)
    assert_near(ours, c * undropped + layer.bias, "layer")
    assert not torch.equal(ours, layer(x))


def test_a_row_without_a_direction_stays_zero():
    model = plain_module()
    layer = model.encoder[0]
    with torch.no_grad():
        layer.weight[3] = 0
    pyadapt.wrap(model, LoraConfig(use_dora=True, target_modules=["0"]))
    y = layer(torch.randn(4, 7))
    assert torch.equal(y[:, 3], layer.bias[3].expand(4))
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.adapters["default"].parameters())


def test_one_output_is_kept_for_backward():
    """Beside what LoRA keeps: z (M, N) and c (N,)."""
    saved = {}
    for use_dora in (False, True):
        model = plain_module()
        pyadapt.wrap(model, LoraConfig(use_dora=use_dora, target_modules=["0"], init_lora_weights=False))
        kept = []

        def pack(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.encoder[0](torch.randn(50, 7, requires_grad=True))
        storages = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept}
        saved[use_dora] = sum(1 for size in storages.values() if size == 50 * 11)
    assert saved == {False: 0, True: 1}


# --- convolutions and embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("conv", "size"), [(nn.Conv1d, (9,)), (nn.Conv2d, (9, 8)), (nn.Conv3d, (7, 6, 5))])
def test_convolutions_as_in_peft(conv, size):
    torch.manual_seed(0)
    model, twin = pair(ConvNet(conv), target_modules=["one", "two"], lora_bias=False)
    unit = model.one.adapters["default"]
    assert tuple(unit.lora_magnitude_vector.shape) == (1, 8, *(1 for _ in size))
    x = torch.randn(2, 3, *size)
    ours, theirs = model(x), twin(x)
    assert_near(ours, theirs, "model")
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_gradients_equal(model, twin)


def test_convolution_without_a_batch():
    torch.manual_seed(0)
    model, _ = pair(ConvNet(), target_modules=["one"])
    x = torch.randn(2, 3, 9, 8)
    assert_near(model.one(x[0]), model.one(x)[0], "layer")


def test_grouped_convolutions_are_refused():
    model = ConvNet(groups=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"two \(Conv2d\): use_dora: a convolution with 2 groups"):
        pyadapt.wrap(model, LoraConfig(use_dora=True, target_modules=["one", "two"]))
    assert snapshot(model) == before


def test_embeddings_as_in_peft():
    torch.manual_seed(0)
    model, twin = pair(TokenNet(), target_modules=["embed", "head"])
    ids = torch.randint(0, 19, (3, 5))
    ours, theirs = model(ids), twin(ids)
    assert_near(ours, theirs, "model")
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_gradients_equal(model, twin)


# --- several adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_is_dora", [False, True])
@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
@pytest.mark.parametrize(
    "make", [lambda: build("bert"), lambda: ConvNet(), lambda: TokenNet()], ids=["bert", "conv", "tokens"]
)
def test_several_at_work_as_in_peft(second_is_dora, order, make):
    torch.manual_seed(0)
    model = make()
    targets = {"BertForSequenceClassification": ["query", "value"], "ConvNet": ["one", "two"], "TokenNet": ["embed"]}
    model, twin = pair(model, target_modules=targets[type(model).__name__])
    second = {
        "use_dora": second_is_dora,
        "init_lora_weights": False,
        "r": 2,
        "target_modules": model.peft_config["default"].target_modules,
    }
    model.add_adapter("second", LoraConfig(**second))
    twin.add_adapter("second", peft.LoraConfig(**second))
    model.set_adapter(order)
    twin.base_model.set_adapter(order)
    perturb(model)
    copy_adapter_to_peft(model, twin, "default")
    copy_adapter_to_peft(model, twin, "second")
    batch = {
        "BertForSequenceClassification": model_batch("bert"),
        "ConvNet": {"x": torch.randn(2, 3, 9, 8)},
        "TokenNet": {"ids": torch.randint(0, 19, (3, 5))},
    }[type(model).__name__]
    ours, theirs = (logits(out) for out in (model(**batch), twin(**batch)))
    assert_near(ours, theirs, "model")
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name in order:
        assert_gradients_equal(model, twin, name)
    merged = pyadapt.merge(model)
    assert_near(logits(merged(**batch)), ours, "merged")


def test_rows_with_an_adapter_each():
    model, _ = family_pair("llama")
    model.add_adapter("second", LoraConfig(init_lora_weights=False, r=2))
    model.add_adapter("third", LoraConfig(use_dora=True, init_lora_weights=False, r=2))
    ids = model_batch("llama", rows=4)["input_ids"]
    names = ["default", "second", "__base__", "third"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=ids[row : row + 1]).logits
        else:
            model.set_adapter(name)
            alone = model(input_ids=ids[row : row + 1]).logits
        assert_near(mixed[row : row + 1], alone, "model")


# --- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("quantised", [False, True])
def test_merging_and_back(name, quantised, tmp_path):
    model = build(name)
    if quantised:
        pyadapt.quantize(model)
    config = {"use_dora": True, "init_lora_weights": False, "r": 4, "task_type": FAMILIES[name].task}
    pyadapt.wrap(model, LoraConfig(**config, lora_bias=name != "llama"))
    perturb(model)
    batch = model_batch(name)
    expected = model(**batch).logits
    before = snapshot(model)
    model.merge_adapter()
    if not quantised:
        assert_near(model(**batch).logits, expected, "merged")
    model.unmerge_adapter()
    assert snapshot(model)["values"] == before["values"]
    assert torch.equal(model(**batch).logits, expected)
    pyadapt.export(model, tmp_path)
    assert_near(type(build(name)).from_pretrained(tmp_path).eval()(**batch).logits, expected, "merged")
    assert_near(pyadapt.merge(model)(**batch).logits, expected, "merged")


@pytest.mark.parametrize("make", [ConvNet, TokenNet])
def test_merging_other_forms(make):
    torch.manual_seed(0)
    targets = ["one", "two"] if make is ConvNet else ["embed"]
    model, _ = pair(make(), target_modules=targets)
    x = torch.randn(2, 3, 9, 8) if make is ConvNet else torch.randint(0, 19, (3, 5))
    expected, before = model(x), snapshot(model)["values"]
    model.merge_adapter()
    assert_near(model(x), expected, "merged")
    model.unmerge_adapter()
    assert snapshot(model)["values"] == before
    assert_near(pyadapt.merge(model)(x), expected, "merged")


# --- norms kept between calls --------------------------------------------------------------------------------------


def count_norms(monkeypatch):
    from pyadapt.methods.lora.dora import DoraUnit

    calls = []
    norm = DoraUnit.norm
    monkeypatch.setattr(DoraUnit, "norm", lambda self, *args: calls.append(1) or norm(self, *args))
    return calls


def test_norms_are_kept_while_nothing_changes(monkeypatch):
    model, _ = pair(plain_module(), target_modules=["0"])
    x = torch.randn(4, 7)
    calls = count_norms(monkeypatch)
    with torch.inference_mode():
        first = model(x)
    for _ in range(3):
        assert torch.equal(model(x), first)
    assert len(calls) == 1
    model(x).sum().backward()
    assert len(calls) == 1
    model.train()
    model(x)
    model(x)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda model, layer, unit: unit.lora_A.add_(1),
        lambda model, layer, unit: unit.lora_B.mul_(2),
        lambda model, layer, unit: layer.weight.add_(1),
        lambda model, layer, unit: setattr(layer, "weight", nn.Parameter(layer.weight * 2, requires_grad=False)),
        lambda model, layer, unit: setattr(layer.weight, "data", layer.weight * 2),
        lambda model, layer, unit: unit.lora_magnitude_vector.mul_(2),
        lambda model, layer, unit: model.rescale(3),
        lambda model, layer, unit: model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}),
        lambda model, layer, unit: model.double(),
    ],
    ids=["A", "B", "weight", "new weight", "weight.data", "magnitude", "scaling", "state dict", "dtype"],
)
def test_kept_norms_follow_every_change(change):
    model, _ = pair(plain_module(), target_modules=["0"])
    layer, unit = model.encoder[0], model.encoder[0].adapters["default"]
    layer(torch.randn(4, 7))
    with torch.no_grad():
        change(model, layer, unit)
    x = torch.randn(4, 7, dtype=layer.weight.dtype)
    moved = layer.weight.double() + unit.scaling * unit.lora_B.double() @ unit.lora_A.double()
    c = unit.lora_magnitude_vector.double() / moved.norm(dim=1)
    exact = x.double() @ (c[:, None] * moved).t() + layer.bias.double()
    assert_near(layer(x), exact, "layer", torch.float32)


def test_kept_norms_stay_out_of_copies_and_files():
    model, _ = pair(plain_module(), target_modules=["0"])
    keys = set(model.state_dict())
    x = torch.randn(4, 7)
    expected = model(x)
    assert set(model.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(again(x), expected)
        unit = again.encoder[0].adapters["default"]
        with torch.no_grad():
            unit.lora_B.mul_(-1)
        assert not torch.equal(again(x), expected)
    assert torch.equal(model(x), expected)


def test_compiled_whole():
    model, _ = pair(plain_module(), target_modules=["0", "2"])
    x = torch.randn(4, 7)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for training in (False, True):
        model.train(training)
        expected = model(x)
        assert_near(compiled(x), expected, "model")
        compiled(x).sum().backward()
    # The scaling becomes a number that the graph takes as an input.
    model.rescale(1.25)
    assert_near(compiled(x), model(x), "model")


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: build("bert"), ConvNet, TokenNet], ids=["bert", "conv", "tokens"])
def test_files_both_ways(make, tmp_path):
    torch.manual_seed(0)
    base = make()
    targets = {"ConvNet": ["one", "two"], "TokenNet": ["embed", "head"]}.get(type(base).__name__, ["query", "value"])
    model, twin = pair(copy.deepcopy(base), target_modules=targets)
    batch = {
        "ConvNet": {"x": torch.randn(2, 3, 9, 8)},
        "TokenNet": {"ids": torch.randint(0, 19, (3, 5))},
    }.get(type(base).__name__, model_batch("bert"))
    expected = logits(model(**batch))
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_near(logits(again(**batch)), expected, "model")
    twin.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    loaded = pyadapt.load(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.equal(logits(loaded(**batch)), expected)
    assert (tmp_path / "ours/adapter_model.safetensors").read_bytes() == (
        tmp_path / "theirs/adapter_model.safetensors"
    ).read_bytes()


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({new: tensor for key, tensor in tensors.items() if (new := change(key)) is not None}, path)


def test_the_older_key_of_the_magnitude(tmp_path):
    base = plain_module()
    model, _ = pair(copy.deepcopy(base), target_modules=["0"])
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda key: key.replace(MAGNITUDE, f"{MAGNITUDE}.weight"))
    x = torch.randn(3, 7)
    assert torch.equal(pyadapt.load(copy.deepcopy(base), tmp_path)(x), model(x))
    assert_near(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x), "model")


def test_a_file_without_magnitudes_is_refused(tmp_path):
    base = plain_module()
    model, _ = pair(copy.deepcopy(base), target_modules=["0"])
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda key: None if MAGNITUDE in key else key)
    before = snapshot(base)
    with pytest.raises(AdapterFileError, match=r"missing:   base_model.model.encoder.0.lora_magnitude_vector \(11,\)"):
        pyadapt.load(base, tmp_path)
    assert snapshot(base) == before


def test_hotswap(tmp_path):
    model, _ = pair(plain_module(), target_modules=["0"])
    other, _ = pair(plain_module(), target_modules=["0"], r=2, lora_alpha=1)
    other.save_pretrained(tmp_path)
    x = torch.randn(3, 7)
    expected = other(x)
    assert not torch.equal(model(x), expected)
    assert model.hotswap_adapter(tmp_path)
    assert_near(model(x), expected, "model")


def test_the_plan_counts_magnitudes():
    plan = pyadapt.plan(plain_module(), LoraConfig(use_dora=True, target_modules=["0"], r=2))
    assert plan.layers[0].shapes[MAGNITUDE] == (11,)
    assert plan.trainable_parameters == 2 * 7 + 11 * 2 + 11
