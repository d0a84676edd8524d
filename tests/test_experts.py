"""LoRA on parameters that a module keeps itself, `target_parameters`: outputs, gradients and files are peft's."""

from __future__ import annotations

import copy

import pytest
import torch
from models import assert_near, copy_adapter_to_peft, peft_twin
from models.mixtures import (
    EXPERTS,
    IMPLEMENTATIONS,
    MIXTURES,
    OPTIONS,
    RANDOM,
    assert_same_step,
    logits,
    mixture,
    pair,
    token_batch,
)

import pyadapt
from pyadapt import LoraConfig

# peft says so of patterns that are for parameters, and then goes by them.
IGNORE_PATTERN_WARNING = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_outputs_and_gradients_equal_peft(name, implementation):
    model, twin = pair(name, implementation)
    assert_same_step(model, twin)
    frozen = [key for key, p in model.named_parameters() if ".adapters." not in key and p.grad is not None]
    assert frozen == []
    assert_near(logits(model.eval()), logits(twin.eval()), "model")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_fp32_adapters_over_bf16_experts(implementation):
    model, twin = pair("gpt_oss", implementation, torch.bfloat16, r=8)
    kinds = {p.dtype for name, p in model.named_parameters() if ".adapters." in name}
    assert kinds == {torch.float32}
    assert_same_step(model, twin, torch.bfloat16)


@pytest.mark.parametrize("name", MIXTURES)
def test_files_both_ways(name, tmp_path):
    import peft

    model, twin = pair(name)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(mixture(name), tmp_path / "ours").eval()
    assert_near(logits(read), expected, "model")

    twin.save_pretrained(tmp_path / "theirs")
    back = pyadapt.load(mixture(name), tmp_path / "theirs").eval()
    assert torch.equal(logits(back), expected)


def test_the_keys_nest_as_in_peft():
    model, _ = pair("qwen3_moe")
    shapes = {key: tuple(value.shape) for key, value in model.get_adapter_state_dict().items() if "experts" in key}
    assert shapes == {
        "model.layers.1.mlp.experts.base_layer.lora_A.weight": (12, 24),
        "model.layers.1.mlp.experts.base_layer.lora_B.weight": (80, 12),
        "model.layers.1.mlp.experts.lora_A.weight": (12, 40),
        "model.layers.1.mlp.experts.lora_B.weight": (24, 12),
    }


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("parameters", [["experts.down_proj"], ["layers.1.mlp.experts.gate_up_proj"]])
def test_one_parameter_alone(name, parameters):
    assert_same_step(*pair(name, target_parameters=parameters))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mixtral", ["mlp.gate.weight"]), ("gpt_oss", ["router.weight", "gate_up_proj_bias", *EXPERTS])],
)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_parameters_of_two_dimensions(name, parameters, implementation):
    assert_same_step(*pair(name, implementation, target_parameters=parameters))


def test_the_weight_of_a_linear_layer_is_adapted_as_the_layer(tmp_path):
    model, twin = pair("mixtral", target_modules=[], target_parameters=["q_proj.weight", *EXPERTS])
    assert_same_step(model, twin)
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(pyadapt.load(mixture("mixtral"), tmp_path)), logits(model.eval()))


@IGNORE_PATTERN_WARNING
def test_patterns_of_rank_and_alpha():
    patterns = {
        "rank_pattern": {"experts.down_proj": 2, r".*layers\.0.*\.gate_up_proj": 5},
        "alpha_pattern": {"gate_up_proj": 9, "q_proj": 2},
    }
    model, twin = pair("mixtral", **patterns)
    assert_same_step(model, twin)
    with pytest.raises(ValueError, match=r"rank_pattern 'up_proj' matches none"):
        pyadapt.plan(mixture("mixtral"), LoraConfig(**OPTIONS, rank_pattern={"up_proj": 2}))


def test_rslora():
    assert_same_step(*pair("gpt_oss", use_rslora=True))


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_first_values_are_distributed_as_in_peft(init):
    options = {**OPTIONS, "target_modules": [], "init_lora_weights": init, "r": 64}
    plain = mixture("mixtral")
    before = logits(plain)
    theirs = peft_twin(plain, **options).get_submodule("base_model.model.model.layers.0.mlp.experts")
    model = pyadapt.wrap(plain, LoraConfig(**options))
    unit = model.model.layers[0].mlp.experts.unit("default")
    A = theirs.lora_A["default"].weight
    assert unit.lora_A.shape == A.shape
    assert unit.lora_A.std().item() == pytest.approx(A.std().item(), rel=0.05)
    assert unit.lora_A.abs().max().item() == pytest.approx(A.abs().max().item(), rel=0.3)
    assert torch.equal(logits(model), before)


def test_one_expert_that_is_stored_transposed():
    """peft adds the delta of a lone expert untransposed, which fits no such weight: the oracle is the formula."""

    class Lone(torch.nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(1, 5, 7))

        def forward(self, x):
            return x @ self.weight[0]

    model = torch.nn.ModuleDict({"experts": Lone()}).double()
    x, plain = torch.randn(4, 5).double(), model["experts"].weight.detach().clone()
    config = LoraConfig(r=2, lora_alpha=3, target_parameters=["experts.weight"], init_lora_weights=False)
    wrapped = pyadapt.wrap(model, config)
    unit = wrapped["experts"].unit("default")
    exact = x @ (plain[0] + 1.5 * (unit.lora_B @ unit.lora_A).T)
    assert_near(wrapped["experts"](x), exact, "layer")


# --- targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_parameters_named_alone_are_adapted_alone(name):
    model, twin = pair(name, target_modules=None)
    assert model.peft_config["default"].target_modules == []
    assert_same_step(model, twin)


def test_names_that_are_in_no_parameter(caplog):
    with pytest.raises(
        ValueError, match=r"no parameter is named 'mlp.experts.gate_up'; the nearest are mlp.experts.gate_up_proj"
    ):
        pyadapt.plan(mixture("mixtral"), LoraConfig(target_parameters=["mlp.experts.gate_up"]))
    # As in peft, a list may name parameters of several architectures.
    plan = pyadapt.plan(mixture("mixtral"), LoraConfig(target_parameters=["feed_forward.experts.w", *EXPERTS]))
    assert [row.path for row in plan.layers if row.base == "experts"] == [
        f"model.layers.{i}.mlp.experts" for i in (0, 1)
    ]
    assert "target_parameters not in this model: feed_forward.experts.w" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, r"mlp.experts \(MixtralExperts\): lora_dropout=0.1: .* set lora_dropout=0"),
        ({"use_dora": True}, r"mlp.experts \(MixtralExperts\): use_dora: .*experts weights have not"),
        ({"lora_bias": True}, r"mlp.experts \(MixtralExperts\): lora_bias=True: .* set lora_bias=False"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa'"),
        (
            {"target_modules": ["experts"]},
            r"name them in target_parameters=\['experts.gate_up_proj', 'experts.down_proj'\]",
        ),
        (
            {"target_parameters": ["input_layernorm.weight"]},
            r"input_layernorm.weight, of shape \(24,\) in a MixtralRMSNorm",
        ),
        ({"target_parameters": ["embed_tokens.weight"]}, "cannot be adapted as a parameter"),
        (
            {"target_parameters": ["q_proj.weight"]},
            "'model.layers.0.self_attn.q_proj' is named in target_modules, and its",
        ),
        ({"target_parameters": "experts.down_proj"}, r"is one string; a list of names is needed"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        pyadapt.plan(mixture("mixtral"), LoraConfig(**{**OPTIONS, **options}))


def test_the_plan_counts_each_parameter():
    plan = pyadapt.plan(mixture("qwen3_moe"), LoraConfig(**OPTIONS, rank_pattern={"gate_up_proj": 4}))
    row = next(row for row in plan.layers if row.base == "experts").as_dict()
    assert row["path"] == "model.layers.1.mlp.experts"
    assert row["shapes"]["base_layer.lora_A.weight"] == [16, 24]
    assert row["parameters"] == 16 * (24 + 80) + 12 * (40 + 24)
    assert "Qwen3MoeExperts  experts" in str(plan)
    model = pyadapt.wrap(mixture("qwen3_moe"), plan.config)
    assert model.get_nb_trainable_parameters() == (plan.trainable_parameters, plan.all_parameters)


# --- the life of an adapter ---------------------------------------------------------------------------


@pytest.fixture
def two():
    """A GPT-OSS with adapters `default` and `second`, and peft's twin."""
    import peft

    second = {**RANDOM, "r": 2, "lora_alpha": 3}
    model, twin = pair("gpt_oss", "grouped_mm")
    model.add_adapter("second", LoraConfig(**second))
    twin.add_adapter("second", peft.LoraConfig(**second))
    copy_adapter_to_peft(model, twin, "second")
    return model.eval(), twin.eval()


def test_switch_sum_disable_and_delete(two):
    model, twin = two
    plain = logits(mixture("gpt_oss", "grouped_mm"))
    first = logits(model)
    model.set_adapter("second")
    twin.set_adapter("second")
    assert_near(logits(model), logits(twin), "model")
    model.set_adapter(["default", "second"])
    twin.base_model.set_adapter(["default", "second"])
    assert_near(logits(model), logits(twin), "model")
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), plain)


def test_scaling_is_in_effect(two):
    model, _ = two
    unscaled = logits(model)
    with model.rescaled(0.0):
        assert_near(logits(model), logits(mixture("gpt_oss", "grouped_mm")), "model")
    assert torch.equal(logits(model), unscaled)


def test_merging_equals_peft_and_unmerging_is_exact(two):
    model, twin = two
    before = {key: value.clone() for key, value in model.state_dict().items()}
    both = ["default", "second"]
    model.merge_adapter(both)
    twin.merge_adapter(both)
    for layer in (0, 1):
        ours = model.model.layers[layer].mlp.experts
        theirs = twin.base_model.model.model.layers[layer].mlp.experts.get_base_layer()
        for name in ("gate_up_proj", "down_proj"):
            assert_near(getattr(ours, name), getattr(theirs, name), "merged")
    assert_near(logits(model), logits(twin), "merged")
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_merging_for_good_and_exporting(name, tmp_path):
    model, _ = pair(name, target_parameters=["experts.down_proj"])
    expected = logits(model.eval())
    pyadapt.export(model, tmp_path)
    exported = type(mixture(name)).from_pretrained(tmp_path)
    assert_near(logits(exported.eval()), expected, "merged")
    plain = model.merge_and_unload()
    assert type(plain.model.layers[0]) is type(mixture(name).model.layers[0])
    assert_near(logits(plain), expected, "merged")


def test_a_merge_that_is_not_finite_changes_nothing():
    model, _ = pair("mixtral")
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.unit("default").lora_B[0, 0] = torch.nan
    before = experts.down_proj.detach().clone()
    with pytest.raises(ValueError, match=r"NaN or an infinity into model.layers.1.mlp.experts"):
        model.merge_adapter()
    assert torch.equal(experts.down_proj, before)


def test_loading_is_strict(tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = pair("mixtral")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    tensors[key.replace("base_layer", "base_layer.base_layer")] = tensors.pop(key)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(pyadapt.AdapterFileError) as error:
        pyadapt.load(mixture("mixtral"), tmp_path)
    assert f"missing:   {key}" in str(error.value)
    assert "extra:     base_model.model.model.layers.0.mlp.experts.base_layer.base_layer" in str(error.value)


def test_a_lower_rank_is_swapped_in(tmp_path):
    model, _ = pair("gpt_oss", r=2, lora_alpha=7)
    model.save_pretrained(tmp_path)
    expected = logits(model.eval())
    other, _ = pair("gpt_oss", r=4)
    parameters = [id(p) for p in other.parameters()]
    assert other.hotswap_adapter(tmp_path)
    assert [id(p) for p in other.parameters()] == parameters
    assert_near(logits(other.eval()), expected, "model")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_ranks_are_padded():
    model, _ = pair("gpt_oss", rank_pattern={"down_proj": 2}, alpha_pattern={"gate_up_proj": 9})
    expected = logits(model.eval())
    model.pad_ranks(8)
    assert model.model.layers[0].mlp.experts.unit("default").lora_A.shape == (4 * 8, 40)
    assert_near(logits(model), expected, "model")


def test_no_choice_by_row():
    model, _ = pair("mixtral")
    with pytest.raises(ValueError, match=r"cannot be chosen by row: model.layers.0.mlp.experts"):
        model(**token_batch(), adapter_names=["default", "__base__"])


def test_a_copy_is_independent():
    model, _ = pair("mixtral")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.unit("default").lora_B.zero_()
    assert not torch.equal(logits(twin.eval()), logits(model.eval()))
