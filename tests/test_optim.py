"""LoRA+: the groups, rates and losses are those of peft's `create_loraplus_optimizer` on a twin."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_twin
from peft.optimizers import create_loraplus_optimizer as create_of_peft
from torch import nn

import pyadapt
from pyadapt import LoraConfig
from pyadapt.optim import create_loraplus_optimizer, loraplus_parameter_groups

RATES = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 3e-5}
# What peft writes into a parameter's name -> what stands there in ours.
OWN_NAMES = {
    ".base_layer.": ".",
    ".modules_to_save.": ".copies.",
    ".lora_A.default.weight": ".adapters.default.lora_A",
    ".lora_B.default.weight": ".adapters.default.lora_B",
    ".lora_B.default.bias": ".adapters.default.lora_bias",
    ".lora_embedding_A.default": ".adapters.default.lora_embedding_A",
    ".lora_embedding_B.default": ".adapters.default.lora_embedding_B",
}
CASES = {
    "llama": {},
    "gpt2": {"modules_to_save": ["wpe"]},
    "bert": {"modules_to_save": ["classifier", "LayerNorm"]},
    "vit": {"modules_to_save": ["classifier"]},
}


def wrapped_and_twin(name, **config):
    """Our wrapped model and peft's twin of it, both with the same random adapter."""
    model = build(name)
    options = {
        "r": 4,
        "task_type": FAMILIES[name].task,
        "target_modules": list(FAMILIES[name].targets),
        "init_lora_weights": False,
        **config,
    }
    twin = peft_twin(model, **options)
    pyadapt.wrap(model, LoraConfig(**options))
    copy_adapter_to_peft(model, twin)
    return model.train(), twin.train()


def settings(model, groups):
    """Name of each parameter in `groups` -> its rate and weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def settings_of_peft(twin):
    optimizer = create_of_peft(twin, torch.optim.AdamW, **RATES)
    return {own_name(name): found for name, found in settings(twin, optimizer.param_groups).items()}


def own_name(name):
    name = name.removeprefix("base_model.model.")
    for theirs, ours in OWN_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def losses(model, optimizer, batches):
    found = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_of_peft(name):
    model, twin = wrapped_and_twin(name, **CASES[name])
    ours = settings(model, create_loraplus_optimizer(model, torch.optim.AdamW, **RATES).param_groups)
    assert ours == settings_of_peft(twin)
    assert ours.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ours == settings(model, loraplus_parameter_groups(model, **RATES))


def test_every_kind_of_parameter_has_its_rate():
    """What the comparison with peft must have covered."""
    model, _ = wrapped_and_twin("bert", **CASES["bert"])
    found = settings(model, loraplus_parameter_groups(model, **RATES))
    layer = "bert.encoder.layer.0.attention.self.query"
    assert found[f"{layer}.adapters.default.lora_A"] == (1e-3, 0.1)
    assert found[f"{layer}.adapters.default.lora_B"] == (8e-3, 0.1)
    assert found["classifier.copies.default.weight"] == (1e-3, 0.1)
    assert found["classifier.copies.default.bias"] == (8e-3, 0.0)
    assert found["bert.embeddings.LayerNorm.copies.default.weight"] == (8e-3, 0.0)


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (
            {
                "embedding": {"lora_embedding_A": (2, 13), "lora_embedding_B": (6, 2)},
                "linear": {"lora_A": (2, 6), "lora_B": (5, 2)},
            },
            {"embedding.adapters.default.lora_embedding_B": (3e-5, 0.1)},
        ),
        (
            {"linear": {"lora_A": (2, 6), "lora_B": (5, 2), "lora_bias": (5,)}},
            {"linear.adapters.default.lora_bias": (8e-3, 0.0), "linear.bias": (8e-3, 0.0)},
        ),
    ],
    ids=["embedding", "biases"],
)
def test_units_of_other_parameters_are_in_the_groups_of_peft(units, expected):
    """Over units laid out by hand: only names and shapes count."""
    model = nn.Sequential()
    model.add_module("embedding", nn.Embedding(13, 6))
    model.add_module("linear", nn.Linear(6, 5))
    biases = any("lora_bias" in shapes for shapes in units.values())
    bias = "lora_only" if biases else "none"
    twin = peft_twin(model, r=2, target_modules=list(units), lora_bias=biases, bias=bias)
    model.requires_grad_(False)
    model.linear.bias.requires_grad_(biases)
    for path, shapes in units.items():
        unit = nn.Module()
        for attribute, shape in shapes.items():
            unit.register_parameter(attribute, nn.Parameter(torch.zeros(shape)))
        model.get_submodule(path).adapters = nn.ModuleDict({"default": unit})
    ours = settings(model, loraplus_parameter_groups(model, **RATES))
    assert ours == settings_of_peft(twin)
    assert expected.items() <= ours.items()


def test_no_norm_decays():
    """peft knows `LayerNorm` alone and lets an RMSNorm decay; the rates are its own."""
    model, twin = wrapped_and_twin("llama", modules_to_save=["model.norm"])
    ours, theirs = settings(model, loraplus_parameter_groups(model, **RATES)), settings_of_peft(twin)
    assert ours["model.norm.copies.default.weight"] == (8e-3, 0.0)
    assert theirs.pop("model.norm.copies.default.weight") == (8e-3, 0.1)
    assert theirs.items() <= ours.items()


def test_only_the_active_adapter_is_in_a_group():
    model, _ = wrapped_and_twin("llama")
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    found = settings(model, loraplus_parameter_groups(model, **RATES))
    assert found
    assert all(".adapters.other." in name for name in found)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_peft_and_fall(name):
    model, twin = wrapped_and_twin(name, **CASES[name])
    batches = [model_batch(name)] * 8
    ours, theirs = (
        losses(trained, create(trained, torch.optim.AdamW, **RATES), batches)
        for trained, create in ((model, create_loraplus_optimizer), (twin, create_of_peft))
    )
    assert_near(ours, theirs, "loss")
    assert ours[-1] < ours[0]


def test_b_moves_ratio_times_as_far():
    ratio, lr = 5.0, 0.1
    start = build("llama", dtype=torch.float64)
    pyadapt.wrap(start, LoraConfig(r=4, init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in start.named_parameters() if p.requires_grad}

    def moves(make):
        with torch.no_grad():
            for name, value in before.items():
                start.get_parameter(name).copy_(value)
        losses(start, make(), [model_batch("llama")])
        return {name: start.get_parameter(name).detach() - value for name, value in before.items()}

    plain = moves(lambda: torch.optim.SGD([start.get_parameter(name) for name in before], lr=lr))
    plus = moves(lambda: create_loraplus_optimizer(start, torch.optim.SGD, lr=lr, loraplus_lr_ratio=ratio))
    for name, move in plain.items():
        factor = ratio if name.endswith("lora_B") else 1.0
        assert move.any()
        assert_near(plus[name], factor * move, "merged")


def test_further_arguments_reach_the_optimizer():
    model, _ = wrapped_and_twin("llama")
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2, momentum=0.9)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.1
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]


def test_bitsandbytes_keeps_trained_embeddings_in_32_bits(monkeypatch):
    from bitsandbytes import optim

    monkeypatch.setattr(optim.GlobalOptimManager, "_instance", None)
    model, _ = wrapped_and_twin("gpt2", modules_to_save=["wpe"])
    create_loraplus_optimizer(model, optim.AdamW8bit, lr=1e-3, loraplus_lr_ratio=2)
    overridden = optim.GlobalOptimManager.get_instance().module_weight_config_triple
    copy = model.get_submodule("transformer.wpe.copies.default")
    assert overridden == [(copy, "weight", {"optim_bits": 32})]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": None}, "lr=None is not a positive number; give the learning rate of A"),
        ({"lr": 0.0}, "lr=0.0 is not a positive number"),
        ({"loraplus_lr_ratio": None}, "loraplus_lr_ratio=None is not a positive number; .* say 16"),
        ({"loraplus_lr_ratio": -2}, "loraplus_lr_ratio=-2 is not a positive number"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 would have no effect.*loraplus_weight_decay"),
    ],
)
def test_bad_rates_are_refused(changes, message):
    model, _ = wrapped_and_twin("llama")
    with pytest.raises(ValueError, match=message):
        create_loraplus_optimizer(model, torch.optim.AdamW, **{**RATES, **changes})


def test_a_model_without_lora_in_training_is_refused():
    plain = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="no LoRA factor among the 2 trained parameters of Linear; wrap the model"):
        loraplus_parameter_groups(plain, 1e-3, 8)
    model, _ = wrapped_and_twin("llama")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"among the 0 trained parameters of LlamaForCausalLM.*set_adapter"):
        loraplus_parameter_groups(model, 1e-3, 8)
