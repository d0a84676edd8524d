"""How A and B start: as peft starts them, with the weight itself left alone, and what is not a start."""

from __future__ import annotations

import json

import pytest
import torch
from models import FAMILIES, build, copy_adapter_to_peft, model_batch, peft_key, peft_twin, plain_module, snapshot
from safetensors.torch import load_file
from tolerance import assert_close, assert_near
from torch import nn

import pyadapt
from pyadapt import LoraConfig

# peft warns of what its conversion to a plain LoRA cannot do, and of two adapters on a model whose weights it changed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),
]

PREFIX = "base_model.model."

# (family, start, further options) that peft gets right. It factors Conv1D's weight untransposed for OLoRA.
STARTS = [
    ("llama", "pissa", {}),
    ("llama", "olora", {}),
    ("llama", "pissa", {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}}),
    ("gpt2", "pissa", {"fan_in_fan_out": True}),
    ("bert", "olora", {"use_rslora": True}),
    ("t5", "pissa", {}),
]
ids = [f"{family}-{init}-{len(options)}" for family, init, options in STARTS]


def options_of(family, init, **options):
    known = FAMILIES[family]
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(known.targets), "task_type": known.task, **options}
    return {**config, "init_lora_weights": init}


def wrapped(family, init, **options):
    return pyadapt.wrap(build(family), LoraConfig(**options_of(family, init, **options)))


def logits(model, family):
    return model(**model_batch(family)).logits


def train(model, family, steps=3):
    """A few steps of plain gradient descent, large enough that A and B move."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for seed in range(steps):
        model.zero_grad()
        model(**model_batch(family, seed)).loss.backward()
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.5 * parameter.grad
    return model


def ours_and_theirs(model, twin):
    """(name, our tensor, peft's) of each tensor of the adapter."""
    import peft

    theirs = peft.get_peft_model_state_dict(twin)
    ours = {PREFIX + key: value for key, value in model.get_adapter_state_dict().items()}
    assert ours.keys() == theirs.keys()
    return [(key, ours[key], theirs[key]) for key in sorted(ours)]


def moved(model, by=0.02):
    """Give a trained adapter's values without training: something other than the start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("family", "init", "options"), STARTS, ids=ids)
def test_values_and_gradients_are_those_of_peft(family, init, options):
    options = options_of(family, init, **options)
    plain = build(family)
    twin = peft_twin(plain, **options)
    model = pyadapt.wrap(plain, LoraConfig(**options))
    for key, ours, theirs in ours_and_theirs(model, twin):
        assert torch.equal(ours, theirs), key
    assert_near(logits(model, family), logits(build(family), family), "model")
    assert_near(logits(model, family), logits(twin, family), "model")
    for each in (model, twin):
        each(**model_batch(family)).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            assert_near(parameter.grad, theirs[peft_key(name)].grad, "gradient")


@pytest.mark.parametrize(("family", "init", "options"), STARTS, ids=ids)
def test_training_goes_as_in_peft(family, init, options):
    options = options_of(family, init, **options)
    twin = train(peft_twin(build(family), **options), family)
    model = train(pyadapt.wrap(build(family), LoraConfig(**options)), family)
    assert not torch.allclose(logits(model, family), logits(build(family), family), rtol=0.1)
    assert_near(logits(model, family), logits(twin, family), "loss")


@pytest.mark.parametrize(("family", "init", "options"), STARTS, ids=ids)
def test_files_both_ways(family, init, options, tmp_path):
    import peft

    options = options_of(family, init, **options)
    model = moved(pyadapt.wrap(build(family), LoraConfig(**options)))
    model.save_pretrained(tmp_path / "ours")
    twin = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    assert_near(logits(twin, family), logits(model, family), "model")
    twin = peft_twin(build(family), **options)
    copy_adapter_to_peft(model, twin)
    twin.save_pretrained(tmp_path / "peft")
    again = pyadapt.load(build(family), tmp_path / "peft")
    assert_near(logits(again, family), logits(twin, family), "model")
    assert_near(logits(again, family), logits(model, family), "model")


def test_olora_on_conv1d():
    """peft factors the stored (K, N) weight, whose factors fit no layer; the oracle is Q R = W of (N, K)."""
    model = wrapped("gpt2", "olora")
    layer = model.transformer.h[0].attn.c_attn
    unit = layer.adapters["default"]
    weight = layer.weight.detach().double().t()
    Q, R = torch.linalg.qr(weight)
    exact = Q[:, :4] @ R[:4]
    assert_close(unit.lora_B.detach() @ unit.lora_A.detach(), exact, "product", torch.float32)
    assert_near(logits(model, "gpt2"), logits(build("gpt2"), "gpt2"), "model")


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_weight_is_not_rounded(init, dtype):
    """peft stores W - s B0 A0 in the weight's dtype (and refuses float64); the oracle is the exact one."""
    layer = nn.Linear(48, 40, bias=False).to(dtype)
    weight = layer.weight.detach().clone()
    model = pyadapt.wrap(
        nn.Sequential(layer), LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=init)
    )
    unit = layer.adapters["default"]
    A0, B0 = unit.lora_A.detach().double().clone(), unit.lora_B.detach().double().clone()
    moved(model, 0.3)
    x = torch.randn(9, 48).to(dtype)
    exact = weight.double() + 1.5 * (unit.lora_B.detach().double() @ unit.lora_A.detach().double() - B0 @ A0)
    part = x.double() @ weight.double().t()
    assert_close(model(x).detach(), x.double() @ exact.t(), "product", dtype, part=part.abs())
    assert torch.equal(layer.weight, weight)
    assert_close(pyadapt.merge(model)[0].weight.detach(), exact, "merged", dtype)


def test_the_base_model_stays():
    plain, model = build("llama"), wrapped("llama", "pissa")
    before = logits(plain, "llama")
    model.add_adapter("second", LoraConfig(**options_of("llama", "olora")))
    moved(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), before)
    model.set_adapter("second")
    assert_near(logits(model, "llama"), before, "model")
    model.delete_adapter("default")
    assert torch.equal(logits(pyadapt.unwrap(model), "llama"), before)


def test_merging_is_that_of_peft():
    options = options_of("llama", "pissa")
    model = moved(pyadapt.wrap(build("llama"), LoraConfig(**options)))
    twin = peft_twin(build("llama"), **options)
    copy_adapter_to_peft(model, twin)
    merged, theirs = pyadapt.merge(model).state_dict(), twin.merge_and_unload().state_dict()
    for key, value in merged.items():
        assert_near(value, theirs[key], "merged")


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_3"])
def test_over_int8(init):
    """The start is worked out from what the int8 values stand for, and is that."""
    quantized = pyadapt.quantize(build("llama"))
    before, weights = logits(quantized, "llama"), snapshot(quantized)["values"]
    model = pyadapt.wrap(quantized, LoraConfig(**options_of("llama", init)))
    assert_near(logits(model, "llama"), before, "model")
    moved(model)
    assert not torch.allclose(logits(model, "llama"), before, rtol=0.01)
    pyadapt.unwrap(model)
    assert snapshot(model)["values"] == weights


def test_fast_svd_is_near_the_exact_one_and_always_the_same():
    U, V = (torch.linalg.qr(torch.randn(size, 20)).Q for size in (40, 30))
    layer = nn.Linear(30, 40)
    with torch.no_grad():
        # Singular values that fall to the half each: every round is worth two bits.
        layer.weight.copy_(U @ torch.diag(0.5 ** torch.arange(20)) @ V.t())

    def start(init):
        model = pyadapt.wrap(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"], init_lora_weights=init))
        unit = model[0].adapters["default"]
        product = unit.lora_B.detach() @ unit.lora_A.detach()
        pyadapt.unwrap(model)
        return product

    exact = start("pissa")
    assert_close(start("pissa_niter_16"), exact, "product", torch.float32)
    assert 1e-4 < (start("pissa_niter_0") - exact).norm() / exact.norm() < 0.3
    state = torch.get_rng_state()
    first = start("pissa_niter_0")
    torch.manual_seed(5)
    assert torch.equal(start("pissa_niter_0"), first)
    # Nothing is drawn from the user's generator.
    torch.set_rng_state(state)
    start("pissa_niter_2")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_of_a_fast_svd_starts_from_the_same(tmp_path):
    model = moved(wrapped("llama", "pissa_niter_1"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(pyadapt.load(build("llama"), tmp_path), "llama"), logits(model, "llama"))


@pytest.mark.parametrize("first", [True, False])
def test_dropout_leaves_the_start_alone(first):
    """x (W - s B0 A0)' is a part of the frozen layer, of which peft drops nothing: with A = 0 that is all there is."""
    model = pyadapt.wrap(
        plain_module(),
        LoraConfig(r=3, lora_dropout=0.5, target_modules=["encoder.0"], init_lora_weights="pissa" if first else True),
    )
    if not first:
        model.add_adapter(
            "p", LoraConfig(r=3, lora_dropout=0.5, target_modules=["encoder.0"], init_lora_weights="pissa")
        )
        model.set_adapter(["default", "p"])
    layer = model.train().encoder[0]
    unit = layer.adapters["default" if first else "p"]
    with torch.no_grad():
        unit.lora_A.zero_()
    x = torch.randn(5, 7)
    weight = layer.weight.double() - unit.scaling * unit.start_B.double() @ unit.start_A.double()
    exact = x.double() @ weight.t() + layer.bias.double()
    assert_close(
        layer(x).detach(), exact.detach(), "product", torch.float32, part=x.double() @ layer.weight.double().t()
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_under_dora_as_in_peft(init):
    options = options_of("llama", init, use_dora=True)
    twin = peft_twin(build("llama"), **options)
    model = pyadapt.wrap(build("llama"), LoraConfig(**options))
    assert_near(logits(model, "llama"), logits(twin, "llama"), "model")
    moved(model)
    copy_adapter_to_peft(model, twin)
    assert_near(logits(model, "llama"), logits(twin, "llama"), "model")


def test_embeddings_beside_start_by_their_own_rule(tmp_path):
    import peft

    options = options_of("llama", "pissa", target_modules=["q_proj", "embed_tokens"])
    model = pyadapt.wrap(build("llama"), LoraConfig(**options))
    assert not model.model.embed_tokens.adapters["default"].lora_embedding_A.any()
    moved(model)
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert_near(logits(twin, "llama"), logits(model, "llama"), "model")
    model.save_pretrained(tmp_path / "plain", as_plain_lora=True)
    twin = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "plain")
    assert_near(logits(twin, "llama"), logits(model, "llama"), "model")


# --- as a plain LoRA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("pissa", {}),
        ("olora", {"use_rslora": True}),
        ("pissa_niter_2", {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}}),
        # peft refuses these together, and would get alpha_pattern wrong.
        ("pissa", {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}}),
        ("pissa", {"use_dora": True}),
    ],
    ids=str,
)
def test_saved_as_plain_lora(init, options, tmp_path):
    import peft

    model = moved(wrapped("llama", init, **options))
    wanted = logits(model, "llama")
    model.save_pretrained(tmp_path, as_plain_lora=True)
    assert torch.equal(logits(model, "llama"), wanted)
    assert model.peft_config["default"].init_lora_weights == init
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 8
    again = pyadapt.load(build("llama"), tmp_path)
    assert again.model.layers[0].self_attn.q_proj.adapters["default"].start_A is None
    assert_near(logits(again, "llama"), wanted, "model")
    assert_near(logits(peft.PeftModel.from_pretrained(build("llama"), tmp_path), "llama"), wanted, "model")


def test_peft_converts_to_the_same_file(tmp_path):
    options = options_of("llama", "pissa")
    twin = peft_twin(build("llama"), **options)
    twin.peft_config["default"].init_lora_weights = True
    twin.save_pretrained(tmp_path / "start")
    twin.peft_config["default"].init_lora_weights = "pissa"
    model = moved(pyadapt.wrap(build("llama"), LoraConfig(**options)))
    copy_adapter_to_peft(model, twin)
    start = str(tmp_path / "start")
    twin.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=start)
    model.save_pretrained(tmp_path / "ours", path_initial_model_for_weight_conversion=start)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        assert ours[key] == theirs[key], key


def test_a_plain_adapter_is_saved_as_it_is(tmp_path):
    model = moved(wrapped("llama", "gaussian"))
    model.save_pretrained(tmp_path / "as it is")
    model.save_pretrained(tmp_path / "asked", as_plain_lora=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "as it is" / file).read_bytes() == (tmp_path / "asked" / file).read_bytes()


# --- orthogonal -------------------------------------------------------------------------------------------------------


def test_orthogonal_is_that_of_peft():
    model = wrapped("llama", "orthogonal")
    twin = peft_twin(build("llama"), **options_of("llama", "orthogonal"))
    layer = model.model.layers[0].self_attn.v_proj
    unit, theirs = layer.adapters["default"], twin.base_model.model.model.layers[0].self_attn.v_proj
    torch.manual_seed(7)
    theirs.orthogonal_init("default")
    torch.manual_seed(7)
    unit.initialize(model.peft_config["default"], "", layer.base, layer)
    assert torch.equal(unit.lora_A, theirs.lora_A["default"].weight)
    assert torch.equal(unit.lora_B, theirs.lora_B["default"].weight)
    assert_near(logits(model, "llama"), logits(build("llama"), "llama"), "model")


# --- what is no start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init", ["pisa", "pissa_niter_x", "pissa_niter_", "pissa_niter_-1", "olora_niter_2", 3, None, []]
)
def test_unknown_names(init):
    known = r"is not one of True, False, 'gaussian', 'orthogonal', .*'pissa', 'pissa_niter_<n>', 'olora'"
    with pytest.raises(ValueError, match=rf"init_lora_weights=.* {known}"):
        LoraConfig(init_lora_weights=init)


def test_names_in_any_case():
    assert LoraConfig(init_lora_weights="PiSSA").init_lora_weights == "pissa"
    assert LoraConfig(init_lora_weights="OLoRA").init_lora_weights == "olora"


def refused(model, match, **options):
    before = snapshot(model)
    for act in (pyadapt.plan, pyadapt.wrap):
        with pytest.raises(ValueError, match=match):
            act(model, LoraConfig(**{"r": 2, "target_modules": ["0"], **options}))
        assert snapshot(model) == before


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_ranks_that_the_weight_has_not(init):
    told = rf"init_lora_weights='{init}' on 0: rank 8 is more than a 7 x 9 weight has; at most 7 is possible"
    refused(nn.Sequential(nn.Linear(9, 7)), told, r=8, init_lora_weights=init)
    pyadapt.wrap(nn.Sequential(nn.Linear(9, 7)), LoraConfig(r=7, target_modules=["0"], init_lora_weights=init))


def test_weights_and_scalings_that_cannot_be_factored():
    model = nn.Sequential(nn.Linear(9, 7))
    refused(model, "a positive lora_alpha is needed", lora_alpha=0, init_lora_weights="pissa")
    with torch.no_grad():
        model[0].weight[3, 4] = float("nan")
    refused(model, "on 0: its weight holds a NaN or an infinity", init_lora_weights="olora")
    empty = nn.Sequential(nn.Linear(9, 7, device="meta"))
    with pytest.raises(RuntimeError, match="on 0: its weight has no values here; load and wrap the model before"):
        pyadapt.wrap(empty, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    assert not pyadapt.is_wrapped(empty)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "eva"])
def test_layers_that_are_not_linear(init):
    refused(nn.Sequential(nn.Conv2d(4, 4, 3)), "on 0: it is for linear layers, not conv", init_lora_weights=init)


def test_an_odd_rank_for_orthogonal():
    refused(nn.Sequential(nn.Linear(9, 7)), r"the rank must be even, .*; it is 3", r=3, init_lora_weights="orthogonal")


def test_data_that_nothing_looks_at():
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match='data is given, but only LoRA with init_lora_weights="eva"'):
        pyadapt.wrap(model, LoraConfig(), data=[model_batch("llama")])
    assert snapshot(model) == before
