"""Several IA3 adapters: at once, a row each, combined, swapped and merged; and what is refused."""

from __future__ import annotations

import peft
import pytest
import torch
from ia3_cases import assert_gradients_equal, pair, quietly, randomise, wrapped
from models import assert_near, build, copy_adapter_to_peft, model_batch, snapshot
from torch import nn

import pyadapt
from pyadapt import IA3Config, LoraConfig

LLAMA = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
OTHER = {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def two(first=LLAMA, second=OTHER, name="llama"):
    """A model with the adapters default and second."""
    model = pyadapt.wrap(build(name), IA3Config(**first))
    model.add_adapter("second", IA3Config(**second))
    randomise(model)
    randomise(model, "second", seed=1)
    return model.eval()


def twin_of_two(model, first=LLAMA, second=OTHER):
    twin = quietly(peft.get_peft_model, build("llama"), peft.IA3Config(**first))
    twin.add_adapter("second", peft.IA3Config(**second))
    for name in ("default", "second"):
        copy_adapter_to_peft(model, twin, name)
    return twin.eval()


def logits(model, **options):
    with torch.no_grad():
        return model(**model_batch("llama"), **options).logits


# --- at once ---------------------------------------------------------------------------------


def test_two_at_once_as_in_peft():
    model, twin = pair("llama", **LLAMA)
    model.add_adapter("second", IA3Config(**OTHER))
    randomise(model, "second", seed=1)
    twin.add_adapter("second", peft.IA3Config(**OTHER))
    copy_adapter_to_peft(model, twin, "second")
    for one in (model, twin.base_model):
        one.set_adapter(["default", "second"])
    assert_gradients_equal(model, twin, model_batch("llama"))


def linear(side, dtype=torch.float64):
    torch.manual_seed(0)
    model = pyadapt.wrap(nn.Sequential(nn.Linear(5, 4)).to(dtype), IA3Config(**side_of(side)))
    randomise(model)
    return model


def side_of(side):
    return {"target_modules": ["0"], "feedforward_modules": ["0"] if side == "input" else []}


@pytest.mark.parametrize("sides", [("output", "input", "output"), ("input", "output", "input"), ("input", "input")])
@pytest.mark.parametrize("form", ["linear", "conv"])
def test_both_sides_at_once(form, sides):
    """peft cannot: a layer's side is that of its first adapter. Factors are multiplied, on either side."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4) if form == "linear" else nn.Conv1d(5, 4, 2)
    model = pyadapt.wrap(nn.Sequential(layer).double(), IA3Config(**side_of(sides[0])), "0")
    for i, side in enumerate(sides[1:], 1):
        model.add_adapter(str(i), IA3Config(**side_of(side)))
    names = [str(i) for i in range(len(sides))]
    for i, name in enumerate(names):
        randomise(model, name, seed=i)
    model.set_adapter(names)
    x = torch.randn(3, 5, dtype=torch.float64) if form == "linear" else torch.randn(3, 5, 6, dtype=torch.float64)
    x = x.requires_grad_()
    model(x).square().sum().backward()
    ls = [model[0].adapters[name].ia3_l for name in names]
    found = [x.grad.clone(), *(l.grad.clone() for l in ls)]
    for leaf in (x, *ls):
        leaf.grad = None
    y = x
    for l, side in zip(ls, sides, strict=True):
        y = y * (l.flatten() if form == "linear" else l) if side == "input" else y
    y = layer.frozen(y)
    for l, side in zip(ls, sides, strict=True):
        y = y * (l.flatten() if form == "linear" else l) if side == "output" else y
    assert_near(model(x), y, "layer")
    y.square().sum().backward()
    for gradient, leaf in zip(found, (x, *ls), strict=True):
        assert_near(gradient, leaf.grad, "gradient")
    expected = model(x)
    model.merge_adapter()
    assert_near(model(x), expected, "merged")


def test_each_row_its_adapter():
    model = two()
    names = ["default", "__base__", "second"]
    ids = model_batch("llama", rows=3)["input_ids"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids[i : i + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids[i : i + 1]).logits
            assert_near(mixed[i : i + 1], alone, "model")


def test_rows_of_ia3_and_of_lora():
    model = two()
    model.add_adapter("lora", LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    ids = model_batch("llama", rows=2)["input_ids"]
    with torch.no_grad():
        mixed = model.eval()(input_ids=ids, adapter_names=["lora", "second"]).logits
        for i, name in enumerate(("lora", "second")):
            model.set_adapter(name)
            assert_near(mixed[i : i + 1], model(input_ids=ids[i : i + 1]).logits, "model")


def test_beside_another_method():
    """Refused on a shared layer, at work and at a merge; on layers of their own they get on."""
    model = two()
    model.add_adapter("lora", LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    model.add_adapter("apart", LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    before = snapshot(model)
    for attempt in (model.set_adapter, model.merge_adapter, model.merge_and_unload):
        for names in (["default", "lora"], ["lora", "default"]):
            with pytest.raises(ValueError, match=r"k_proj: default \(IA3\) multiplies .* so they cannot be at work"):
                attempt(names)
    assert snapshot(model) == before
    model.set_adapter(["default", "apart"])
    expected = logits(model)
    model.merge_adapter()
    assert_near(logits(model), expected, "merged")


# --- merged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_merged_is_unmerged(name):
    model = wrapped(name)
    batch = model_batch(name)
    before = model(**batch).logits
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    assert_near(model(**batch).logits, before, "merged")
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    assert_near(pyadapt.merge(model)(**batch).logits, before, "merged")


def test_unmerging_is_exact_at_zero():
    """peft divides by l + 1e-8, and loses the weight."""
    model = linear("output", torch.float32)
    before = model[0].weight.clone(), model[0].bias.clone()
    with torch.no_grad():
        model[0].adapters["default"].ia3_l[1] = 0.0
    model.merge_adapter()
    assert not model[0].weight[1].any()
    assert model[0].bias[1] == 0
    model.unmerge_adapter()
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[0].bias, before[1])


def test_a_merge_that_would_not_be_finite():
    model = linear("output", torch.float32)
    with torch.no_grad():
        model[0].adapters["default"].ia3_l[1] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match="would put a NaN or an infinity into 0"):
        model.merge_adapter()
    assert snapshot(model) == before


# --- combined --------------------------------------------------------------------------------


def factors(model, name):
    return model.get_adapter_state_dict(name)


def test_a_weighted_sum_as_in_peft():
    """On layers that both adapters have."""
    model = two(LLAMA, LLAMA)
    twin = twin_of_two(model, LLAMA, LLAMA)
    for one in (model, twin.base_model):
        one.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum")
    twin.base_model.set_adapter("sum")
    model.set_adapter("sum")
    assert_near(logits(model), logits(twin), "model")
    assert model.peft_config["sum"].target_modules == sorted(LLAMA["target_modules"])
    assert model.peft_config["sum"].feedforward_modules == LLAMA["feedforward_modules"]


def test_an_adapter_without_the_layer_multiplies_by_one():
    """peft counts it as 0: half of each of two adapters would halve k, which one of them leaves alone."""
    model = two()
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    assert set(model.peft_config["mean"].target_modules) == {"q_proj", "k_proj", "v_proj", "down_proj"}
    first, second, mean = (factors(model, name) for name in ("default", "second", "mean"))
    assert mean.keys() == first.keys() | second.keys()
    for key, value in mean.items():
        parts = [part.get(key, torch.ones(())) for part in (first, second)]
        assert_near(value, (0.5 * parts[0] + 0.5 * parts[1]).expand_as(value), "layer")
    twin = twin_of_two(model)
    twin.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    theirs = twin.base_model.model.model.layers[0].self_attn.k_proj.ia3_l["mean"]
    k = model.model.layers[0].self_attn.k_proj
    assert_near(theirs, 0.5 * k.adapters["default"].ia3_l, "layer")
    assert_near(k.adapters["mean"].ia3_l, theirs + 0.5, "layer")


def test_a_sum_whose_lists_mean_other_layers():
    """Where the union of the lists would mean more, the new adapter names its layers outright."""
    model = two(LLAMA, {**OTHER, "exclude_modules": ["layers.0.mlp.down_proj", "layers.0.self_attn.q_proj"]})
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    config = model.peft_config["sum"]
    assert "model.layers.1.self_attn.q_proj" in config.target_modules
    assert not any("layers.0.self_attn.q_proj" in name for name in config.target_modules)
    assert config.feedforward_modules == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_a_sum_of_expressions(tmp_path):
    expression = {"target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": r".*down_proj"}
    model = two(LLAMA, expression)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    assert factors(model, "mean").keys() == factors(model, "default").keys()
    model.set_adapter("mean")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    assert_near(logits(pyadapt.load(build("llama"), tmp_path / "mean")), expected, "model")


@pytest.mark.parametrize(
    ("second", "weights", "options", "match"),
    [
        ({**LLAMA, "feedforward_modules": []}, [1, 1], {}, "down_proj: default its input, second its output is scaled"),
        (LLAMA, [1], {}, "2 adapters and 1 weights"),
        (LLAMA, [1, float("nan")], {}, "finite numbers"),
        (LLAMA, [1, 1], {"combination_type": "svd"}, "'combination_type': IA3 adapters are combined in one way"),
    ],
)
def test_what_has_no_sum(second, weights, options, match):
    model = two(LLAMA, second)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(["default", "second"], weights, "sum", **options)
    assert snapshot(model) == before


# --- swapped, scaled -------------------------------------------------------------------------


def test_hotswap(tmp_path):
    other = wrapped("llama", seed=5)
    other.save_pretrained(tmp_path)
    model = wrapped("llama")
    before = {name: id(p) for name, p in model.named_parameters()}
    assert model.hotswap_adapter(tmp_path)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert_near(logits(model), logits(other), "model")


def test_hotswap_of_the_other_side_of_a_convolution(tmp_path):
    """The factors of either side have one shape here: the adapter is loaded anew."""
    models = []
    for side in ("output", "input"):
        torch.manual_seed(0)
        model = pyadapt.wrap(nn.Sequential(nn.Conv1d(4, 4, 2)), IA3Config(**side_of(side)))
        randomise(model)
        models.append(model)
    models[1].save_pretrained(tmp_path)
    x = torch.randn(2, 4, 5)
    assert not models[0].hotswap_adapter(tmp_path)
    assert_near(models[0](x), models[1](x), "layer")


def test_there_is_no_scaling():
    model = wrapped("llama")
    for attempt in (lambda: model.set_scale("default", 2.0), lambda: model.rescale(2.0)):
        with pytest.raises(ValueError, match="adapter 'default' has no scaling: LinearUnit multiplies by no constant"):
            attempt()


def test_a_printed_model_says_which_side():
    told = repr(linear("input"))
    assert "5 factors of the input" in told
    assert "4 factors of the output" in repr(linear("output"))
