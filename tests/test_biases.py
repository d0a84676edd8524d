"""Biases of the base model that an adapter trains, against the installed peft."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from models import FAMILIES, assert_near, build, model_batch, peft_twin, plain_module, snapshot
from peft_gradients import assert_gradients_equal
from torch import nn

import pyadapt
from pyadapt import LoraConfig
from pyadapt.biases import TrainedBias, biased_modules
from pyadapt.files import AdapterFileError


def step_biases(model, by=0.1, name="default"):
    """Move each trained bias of one adapter, and its B, as training would."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(f"bias_of_{name}") or f".adapters.{name}.lora_B" in key:
                parameter.add_(by * torch.randn(parameter.shape).to(parameter.dtype))


def wrapped(family, bias, **options):
    model = build(family)
    config = {
        "target_modules": list(FAMILIES[family].targets),
        "task_type": FAMILIES[family].task,
        "bias": bias,
        "r": 4,
    }
    pyadapt.wrap(model, LoraConfig(**{**config, **options}))
    step_biases(model)
    return model


def twin_of(model, family):
    """peft's model with the same values: it trains the model's own biases, so the copies go into them."""
    config = model.peft_config["default"]
    options = {"target_modules": config.target_modules, "task_type": FAMILIES[family].task, "bias": config.bias, "r": 4}
    twin = peft_twin(build(family), **options)
    values = {f"base_model.model.{key}": value for key, value in model.get_adapter_state_dict().items()}
    result = peft.set_peft_model_state_dict(twin, {key: value.detach().clone() for key, value in values.items()})
    assert not result.unexpected_keys
    return twin


def base_values(model):
    return {
        key: value.clone()
        for key, value in model.state_dict().items()
        if ".adapters." not in key and ".copies." not in key and "bias_of_" not in key
    }


def assert_same_values(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "llama"])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_step_as_in_peft(family, bias):
    model = wrapped(family, bias)
    twin = twin_of(model, family)
    batch = model_batch(family)
    ours, theirs = model(**batch), twin(**batch)
    assert_near(ours.logits, theirs.logits, "model")
    ours.loss.backward()
    theirs.loss.backward()
    assert_gradients_equal(model, twin)
    assert model.get_nb_trainable_parameters()[0] == twin.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_frozen_int8_layers_give_their_bias_a_gradient(bias):
    model = pyadapt.quantize(build("bert"))
    dense = build("bert")
    for path, layer in model.named_modules():
        if hasattr(layer, "weight_scale"):
            with torch.no_grad():
                dense.get_submodule(path).weight.copy_(layer.weight * layer.weight_scale.view(torch.float32)[:, None])
    config = {"task_type": "SEQ_CLS", "bias": bias, "r": 4}
    twin = peft_twin(dense, **config)
    pyadapt.wrap(model, LoraConfig(**config))
    step_biases(model)
    values = {f"base_model.model.{key}": value for key, value in model.get_adapter_state_dict().items()}
    peft.set_peft_model_state_dict(twin, {key: value.detach().clone() for key, value in values.items()})
    batch = model_batch("bert")
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    assert_gradients_equal(model, twin)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa", "r": 4}])
def test_beside_other_options(options):
    """Through autograd alone: the gradient of a bias is the sum of the output's."""
    model = plain_module()
    pyadapt.wrap(model, LoraConfig(target_modules=["0"], bias="lora_only", **options))
    layer = model.encoder[0]
    g = torch.randn(4, 11)
    (layer(torch.randn(4, 7)) * g).sum().backward()
    assert_near(layer.bias_of_default.grad, g.sum(0), "gradient")


def test_an_optimizer_moves_the_copies_alone():
    model = wrapped("bert", "all")
    before = base_values(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**model_batch("bert")).loss.backward()
    copies = {path: module.bias.detach().clone() for path, module in biased_modules(model)}
    optimizer.step()
    assert_same_values(base_values(model), before)
    # A softmax does not see the bias of its keys; the others move.
    moved = [path for path, module in biased_modules(model) if not torch.equal(module.bias, copies[path])]
    assert set(copies) - set(moved) <= {path for path in copies if path.endswith("key")}


def test_what_is_trained():
    lora_only = {path for path, _ in biased_modules(wrapped("bert", "lora_only"))}
    assert lora_only == {f"bert.encoder.layer.{i}.attention.self.{of}" for i in (0, 1) for of in ("query", "value")}
    every = {path for path, _ in biased_modules(wrapped("bert", "all"))}
    plain = build("bert")
    assert every == {path for path, m in plain.named_modules() if getattr(m, "bias", None) is not None} - {"classifier"}
    assert {path for path, _ in biased_modules(wrapped("llama", "all"))} == set()


def test_classes_and_types_stay():
    model = wrapped("bert", "all")
    norm = model.bert.embeddings.LayerNorm
    assert type(norm).__name__ == "LayerNorm"
    assert isinstance(norm, nn.LayerNorm)
    pyadapt.unwrap(model)
    assert type(norm) is nn.LayerNorm


def test_a_bias_that_two_modules_share_stays_shared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
            self.two.bias = self.one.bias

        def forward(self, x):
            return self.two(self.one(x))

    model = Net()
    plan = pyadapt.plan(model, LoraConfig(target_modules=["one"], bias="all"))
    assert plan.biases == {"one": 5, "two": 0}
    pyadapt.wrap(model, LoraConfig(target_modules=["one"], bias="all"))
    assert model.one.bias_of_default is model.two.bias_of_default
    assert model.get_nb_trainable_parameters() == (plan.trainable_parameters, plan.all_parameters)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_the_plan_counts_biases(bias):
    plan = pyadapt.plan(build("bert"), LoraConfig(bias=bias))
    twin = peft_twin(build("bert"), bias=bias)
    assert (plan.trainable_parameters, plan.all_parameters) == twin.get_nb_trainable_parameters()
    assert plan.as_dict()["biases"] == plan.biases
    assert ("biases" in str(plan)) == (bias != "none")


def test_half_precision_keeps_the_dtype_of_the_bias():
    model = build("bert", dtype=torch.bfloat16)
    pyadapt.wrap(model, LoraConfig(task_type="SEQ_CLS", bias="all"))
    model(**model_batch("bert")).loss.backward()
    for path, module in biased_modules(model):
        assert module.bias_of_default.dtype == torch.bfloat16, path
        assert module.bias_of_default.grad is not None, path


def test_autocast():
    model = wrapped("bert", "all")
    expected = model(**model_batch("bert")).logits
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(**model_batch("bert"))
        ours.loss.backward()
    assert_near(ours.logits, expected, "model", torch.bfloat16)
    assert all(module.bias_of_default.grad is not None for _, module in biased_modules(model))


def test_compiled_whole():
    model = plain_module()
    pyadapt.wrap(model, LoraConfig(target_modules=["0"], bias="all"))
    step_biases(model)
    x = torch.randn(3, 7)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near(compiled(x), model(x), "model")
    compiled(x).sum().backward()
    assert all(module.bias_of_default.grad is not None for _, module in biased_modules(model))


# --- switching --------------------------------------------------------------------------------------------------------


def test_disabling_and_unwrapping_give_the_base_back():
    plain = build("bert")
    batch = model_batch("bert")
    expected = plain(**batch).logits
    model = wrapped("bert", "all")
    trained = model(**batch).logits
    assert_same_values(base_values(model), plain.state_dict())
    assert not torch.equal(trained, expected)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, trained)
    assert_same_values(pyadapt.unwrap(model).state_dict(), plain.state_dict())
    assert torch.equal(model(**batch).logits, expected)
    assert not list(biased_modules(model))
    assert not any("bias_of" in key or key == "live_bias" for module in model.modules() for key in vars(module))


def test_several_adapters_each_with_biases():
    """peft allows one; here each has copies, and the first at work answers."""
    model = wrapped("bert", "all")
    batch = model_batch("bert")
    first = model(**batch).logits
    model.add_adapter("second", LoraConfig(task_type="SEQ_CLS", bias="lora_only"))
    model.set_adapter("second")
    step_biases(model, name="second")
    second = model(**batch).logits
    query = model.bert.encoder.layer[0].attention.self.query
    assert query.bias is query.bias_of_second
    assert not query.bias_of_default.requires_grad
    model.set_adapter(["default", "second"])
    assert query.bias is query.bias_of_default
    model(**batch).loss.backward()
    assert query.bias_of_default.grad is not None
    assert query.bias_of_second.grad is None
    model.set_adapter(["second", "default"])
    assert query.bias is query.bias_of_second
    # The one that has no copy here leaves it to the next.
    norm = model.bert.embeddings.LayerNorm
    assert norm.bias is norm.bias_of_default
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    model.delete_adapter("default")
    assert torch.equal(model(**batch).logits, second)
    assert type(norm) is nn.LayerNorm


def test_an_adapter_without_biases_in_front_of_one_with_them():
    """The first unit computes the frozen product, and has to leave the bias to autograd all the same."""
    model = build("bert")
    pyadapt.wrap(model, LoraConfig(task_type="SEQ_CLS"))
    model.add_adapter("second", LoraConfig(task_type="SEQ_CLS", bias="lora_only"))
    model.set_adapter(["default", "second"])
    model(**model_batch("bert")).loss.backward()
    query = model.bert.encoder.layer[0].attention.self.query
    assert query.bias is query.bias_of_second
    assert query.bias.grad.abs().max() > 0


def test_renaming():
    model = wrapped("bert", "all")
    expected = model(**model_batch("bert")).logits
    model.rename_adapter("default", "other")
    assert torch.equal(model(**model_batch("bert")).logits, expected)
    norm = model.bert.embeddings.LayerNorm
    assert norm.bias is norm.bias_of_other


def test_a_module_that_another_adapter_trains_whole():
    model = wrapped("bert", "all")
    model.add_adapter("second", LoraConfig(target_modules=["query"], modules_to_save=["pooler"]))
    pooler = model.bert.pooler
    assert not list(biased_modules(pooler.copies["second"]))
    model.set_adapter("second")
    model(**model_batch("bert")).loss.backward()
    assert pooler.copies["second"].dense.bias.grad is not None
    assert pooler.dense.bias_of_default.grad is None


def test_deepcopy_pickle_and_to():
    model = wrapped("bert", "all")
    batch = model_batch("bert")
    expected = model(**batch).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(again(**batch).logits, expected)
        norm = again.bert.embeddings.LayerNorm
        assert norm.bias is norm.bias_of_default
        assert norm.bias is not model.bert.embeddings.LayerNorm.bias
    model.double()
    assert model.bert.embeddings.LayerNorm.bias.dtype == torch.float64
    assert all(parameter.is_meta for parameter in copy.deepcopy(model).to("meta").parameters())


def test_the_state_dict_goes_round():
    model, again = wrapped("bert", "all"), build("bert", seed=3)
    pyadapt.wrap(again, LoraConfig(task_type="SEQ_CLS", bias="all", r=4))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**model_batch("bert")).logits, model(**model_batch("bert")).logits)


def test_every_parameter_is_the_attribute_of_its_name():
    """Engines that shard take one for the other, and put tensors of their own there around each forward."""
    model = wrapped("bert", "all")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert getattr(module, name) is parameter
    norm = model.bert.embeddings.LayerNorm
    assert [name for name, _ in norm.named_parameters()] == ["weight", "own_bias", "bias_of_default"]
    model.unload()
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]


def test_base_checkpoints_still_load():
    model, other = wrapped("bert", "all"), build("bert", seed=3)
    copies = {path: module.bias.detach().clone() for path, module in biased_modules(model)}
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("bias_of_" in key or ".adapters." in key or ".copies." in key for key in result.missing_keys)
    assert_same_values(base_values(model), other.state_dict())
    assert all(torch.equal(module.bias, copies[path]) for path, module in biased_modules(model))
    state = model.state_dict()
    del state["bert.embeddings.LayerNorm.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bert.embeddings.LayerNorm.bias"'):
        model.load_state_dict(state)


def test_rows_with_an_adapter_each():
    """A row can have an adapter without biases; one with them answers for whole batches."""
    model = wrapped("bert", "all")
    model.add_adapter("second", LoraConfig(target_modules=["query"], init_lora_weights=False))
    batch = {key: value for key, value in model_batch("bert").items() if key != "labels"}
    live = model(**batch).logits
    mixed = model(**batch, adapter_names=["second", "__base__"]).logits
    assert torch.equal(model(**batch).logits, live)
    model.set_adapter("second")
    assert_near(mixed[:1], model(**batch).logits[:1], "model")
    with model.disable_adapter():
        assert_near(mixed[1:], model(**batch).logits[1:], "model")
    with pytest.raises(ValueError, match="adapter 'default' cannot be chosen by row: it trains the bias of"):
        model(**batch, adapter_names=["default", "second"])


def test_hotswap(tmp_path):
    model, other = wrapped("bert", "all"), wrapped("bert", "all")
    step_biases(other)
    other.save_pretrained(tmp_path)
    expected = other(**model_batch("bert")).logits
    assert not torch.equal(model(**model_batch("bert")).logits, expected)
    assert model.hotswap_adapter(tmp_path)
    assert torch.equal(model(**model_batch("bert")).logits, expected)


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}], ids=["plain", "bias of B", "dora"])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_merging_and_back(family, options, bias, tmp_path):
    model = wrapped(family, bias, init_lora_weights=False, **options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("lora_bias"):
                parameter.normal_(std=0.1)
    batch = model_batch(family)
    expected, before = model(**batch).logits, snapshot(model)["values"]
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    assert_near(model(**batch).logits, expected, "merged")
    model.save_pretrained(tmp_path / "merged")
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    model.unmerge_adapter()
    assert snapshot(model)["values"] == before
    assert torch.equal(model(**batch).logits, expected)
    pyadapt.export(model, tmp_path / "plain")
    plain = type(build(family)).from_pretrained(tmp_path / "plain").eval()
    assert_near(plain(**batch).logits, expected, "merged")
    merged = pyadapt.merge(model)
    assert_near(merged(**batch).logits, expected, "merged")
    assert merged.state_dict().keys() == build(family).state_dict().keys()


def test_merging_int8_to_plain():
    model = pyadapt.quantize(build("bert"))
    pyadapt.wrap(model, LoraConfig(task_type="SEQ_CLS", bias="all"))
    step_biases(model)
    expected = model(**model_batch("bert")).logits
    norm, dense = model.bert.embeddings.LayerNorm, model.bert.pooler.dense
    merged = pyadapt.merge(model)
    assert_near(merged(**model_batch("bert")).logits, expected, "merged")
    assert (type(norm), type(dense)) == (nn.LayerNorm, nn.Linear)


def test_merging_another_adapter_than_the_active_one():
    model = wrapped("bert", "all")
    batch = model_batch("bert")
    model.add_adapter("second", LoraConfig(task_type="SEQ_CLS", bias="lora_only", lora_bias=True))
    model.set_adapter("second")
    step_biases(model, name="second")
    second = model(**batch).logits
    model.set_adapter("default")
    first, before = model(**batch).logits, snapshot(model)["values"]
    model.merge_adapter(["second"])
    assert_near(model(**batch).logits, second, "merged")
    model.unmerge_adapter()
    assert torch.equal(model(**batch).logits, first)
    assert snapshot(model)["values"] == before
    assert_near(model.merge_and_unload(adapter_names=["second"])(**batch).logits, second, "merged")


def test_a_nan_in_a_bias_is_refused_before_anything_changes(tmp_path):
    model = wrapped("bert", "all")
    with torch.no_grad():
        model.bert.pooler.dense.bias_of_default[2] = float("nan")
    before = snapshot(model)
    for attempt in (lambda: pyadapt.merge(model), lambda: pyadapt.export(model, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"the bias of bert\.pooler\.dense"):
            attempt()
        assert snapshot(model) == before
    assert not (tmp_path / "out").exists()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_files_both_ways(family, bias, tmp_path):
    model = wrapped(family, bias)
    batch = model_batch(family)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    assert_near(theirs(**batch).logits, expected, "model")
    twin_of(model, family).save_pretrained(tmp_path / "theirs")
    assert torch.equal(pyadapt.load(build(family), tmp_path / "theirs")(**batch).logits, expected)
    assert torch.equal(pyadapt.load(build(family), tmp_path / "ours")(**batch).logits, expected)


def test_keys_are_those_of_peft(tmp_path):
    """But for the biases in modules that are trained whole, which peft writes three times."""
    from safetensors.torch import load_file

    model = wrapped("bert", "all")
    model.save_pretrained(tmp_path / "ours")
    twin_of(model, "bert").save_pretrained(tmp_path / "theirs")
    ours, theirs = (set(load_file(tmp_path / of / "adapter_model.safetensors")) for of in ("ours", "theirs"))
    again = {f"base_model.model.classifier.{of}.bias" for of in ("original_module", "modules_to_save")}
    assert ours == theirs - again
    assert again <= theirs


def test_a_file_without_its_biases_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    wrapped("bert", "all").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if not key.endswith("LayerNorm.bias")}
    tensors["base_model.model.bert.pooler.dense.bias"] = torch.zeros(3)
    save_file(tensors, path)
    model = build("bert")
    before = snapshot(model)
    with pytest.raises(
        AdapterFileError, match=r"missing:   base_model\.model\.bert\.embeddings\.LayerNorm\.bias"
    ) as error:
        pyadapt.load(model, tmp_path)
    assert "misshapen: base_model.model.bert.pooler.dense.bias is (3,), the model needs (24,)" in str(error.value)
    assert snapshot(model) == before


def test_saving_from_a_gathered_state_dict(tmp_path):
    model = wrapped("bert", "all")
    model.save_pretrained(tmp_path / "live")
    state = model.state_dict()
    model.save_pretrained(tmp_path / "gathered", state_dict=state)
    name = "adapter_model.safetensors"
    assert (tmp_path / "live" / name).read_bytes() == (tmp_path / "gathered" / name).read_bytes()


def test_an_offloaded_bias_is_refused():
    from accelerate import cpu_offload

    model = plain_module()
    cpu_offload(model.norm, execution_device=torch.device("cpu"))
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="the bias of norm is offloaded"):
        pyadapt.wrap(model, LoraConfig(target_modules=["0"], bias="all"))
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert not any(isinstance(module, TrainedBias) for module in model.modules())


def test_a_bad_value():
    with pytest.raises(ValueError, match="bias='some' is not one of none, lora_only, all"):
        LoraConfig(bias="some")
