"""LoRA on embeddings, against peft: values, gradients, files; merged against unmerged."""

from __future__ import annotations

import copy
import json
import logging

import peft
import pytest
import torch
from models import build, copy_adapter_to_peft, model_batch, snapshot
from safetensors.torch import load_file, save_file
from tolerance import assert_close, assert_near
from torch import nn

import pyadapt
from pyadapt import LoraConfig
from pyadapt.files import AdapterFileError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
]
IDS = torch.tensor([[0, 3, 3, 5], [9, 1, 3, 0]])
OPTIONS = [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 0.7}]
OPTIONS += [{"padding_idx": -1, "scale_grad_by_freq": True}]
FILE = "adapter_model.safetensors"


def name_of(options):
    return "-".join(f"{key}={value}" for key, value in options.items()) or "plain"


class Scaled(nn.Embedding):
    """As Gemma scales: by a tensor, in the dtype of the weight; as BART does: by a number."""

    def __init__(self, *args, embed_scale, **options):
        super().__init__(*args, **options)
        self.embed_scale = embed_scale

    def forward(self, ids):
        scale = self.embed_scale
        return super().forward(ids) * (scale.to(self.weight.dtype) if isinstance(scale, torch.Tensor) else scale)


def net(dtype=torch.float32, scale=None, **options):
    torch.manual_seed(0)
    table = nn.Embedding(11, 6, **options) if scale is None else Scaled(11, 6, embed_scale=scale, **options)
    return nn.Sequential(table, nn.Linear(6, 4)).to(dtype).eval()


def wrapped(dtype=torch.float32, scale=None, config=(), **options):
    config = {"target_modules": ["0"], "r": 3, "lora_alpha": 5, "init_lora_weights": False, **dict(config)}
    return pyadapt.wrap(net(dtype, scale, **options), LoraConfig(**config))


def twin_of(model, scale=None, config=(), **options):
    config = {"target_modules": ["0"], "r": 3, "lora_alpha": 5, **dict(config)}
    twin = peft.get_peft_model(net(scale=scale, **options), peft.LoraConfig(**config))
    copy_adapter_to_peft(model, twin)
    return twin


@pytest.mark.parametrize("scale", [None, 3.0, torch.tensor(2.5)], ids=["unscaled", "number", "tensor"])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_values_and_gradients_are_those_of_peft(options, scale):
    model = wrapped(scale=scale, **options)
    twin = twin_of(model, scale, **options)
    y, expected = model(IDS), twin(IDS)
    assert_near(y, expected, "layer")
    y.square().sum().backward()
    expected.square().sum().backward()
    unit, theirs = model[0].adapters["default"], twin.base_model.model[0]
    pairs = [
        (unit.lora_embedding_A, theirs.lora_embedding_A["default"]),
        (unit.lora_embedding_B, theirs.lora_embedding_B["default"]),
    ]
    for own, other in pairs:
        assert_near(own.grad, other.grad, "gradient")
        # max_norm shortens rows in place, as the layer itself does.
        assert_near(own, other, "layer")
    assert model[0].weight.grad is None


def test_a_sparse_embedding_has_dense_gradients_of_the_adapter():
    """peft cannot train it; the oracle is the embedding that is not sparse."""
    model, dense = wrapped(sparse=True), wrapped()
    with pytest.raises(RuntimeError, match="sparse"):
        twin_of(model, sparse=True)(IDS).sum().backward()
    dense[0].adapters["default"].load_state_dict(model[0].adapters["default"].state_dict())
    for one in (model, dense):
        one(IDS).square().sum().backward()
    for own, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 3.0, torch.tensor(2.51)], ids=["unscaled", "number", "tensor"])
def test_merged_is_unmerged(dtype, scale, tmp_path):
    model = wrapped(dtype, scale, padding_idx=3)
    before, plain = model(IDS), net(dtype, scale, padding_idx=3)(IDS)
    assert not torch.allclose(before, plain)
    model.merge_adapter()
    assert_near(model(IDS), before, "merged")
    model.unmerge_adapter()
    assert torch.equal(model[0].weight, net(dtype, scale, padding_idx=3)[0].weight)
    with model.disable_adapter():
        assert torch.equal(model(IDS), plain)
    pyadapt.export(model, tmp_path)
    again = net(dtype, scale, padding_idx=3)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_near(again(IDS), before, "merged")
    merged = pyadapt.merge(model)
    assert type(merged[0]) is (nn.Embedding if scale is None else Scaled)
    assert_near(merged(IDS), before, "merged")


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", False])
def test_first_values(init):
    """peft starts A at zero and B normal whatever it is told, and both normal for False."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], r=256, init_lora_weights=init)
    model = pyadapt.wrap(nn.Sequential(nn.Embedding(50, 40)), config)
    unit = model[0].adapters["default"]
    assert abs(unit.lora_embedding_B.std() - 1) < 0.05
    assert abs(unit.lora_embedding_B.mean()) < 0.05
    if init is False:
        assert abs(unit.lora_embedding_A.std() - 1) < 0.05
    else:
        assert not unit.lora_embedding_A.any()
        assert torch.equal(model(IDS), model[0].frozen(IDS))


def test_dropout_is_not_for_ids():
    model = wrapped(config={"lora_dropout": 0.9}).train()
    assert torch.equal(model(IDS), model.eval()(IDS))


def test_files_go_both_ways(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / FILE)
    shapes = {f"base_model.model.0.lora_embedding_{k}": s for k, s in (("A", (3, 11)), ("B", (6, 3)))}
    assert {key: tuple(value.shape) for key, value in ours.items()} == shapes
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    assert_near(theirs(IDS), model(IDS), "layer")
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(pyadapt.load(net(), tmp_path / "theirs")(IDS), model(IDS))


def with_targets(*targets, model=None):
    model = model or build("llama")
    config = LoraConfig(target_modules=list(targets), r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    return pyadapt.wrap(model, config)


@pytest.mark.parametrize("targets", [("embed_tokens", "q_proj"), ("lm_head",), ("lm_head", "embed_tokens")])
def test_weights_of_targeted_embeddings_lie_in_the_file(targets, tmp_path):
    model = with_targets(*targets)
    batch = model_batch("llama")
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval()
    assert_near(theirs(**batch).logits, model(**batch).logits, "model")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / which / FILE) for which in ("ours", "theirs"))
    assert ours.keys() == again.keys()
    assert sum(key.endswith("base_layer.weight") for key in ours) == len([t for t in targets if t != "q_proj"])
    for key in ours:
        assert torch.equal(ours[key], again[key])
    loaded = pyadapt.load(build("llama"), tmp_path / "theirs")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    # Merged in place, the file still holds the base model's weight.
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / FILE).read_bytes() == (tmp_path / "ours" / FILE).read_bytes()


def test_another_base_weight_in_the_file_is_taken_over(tmp_path, caplog):
    model = with_targets("embed_tokens")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][5] += 1
    save_file(tensors, tmp_path / FILE)
    with caplog.at_level(logging.WARNING, "pyadapt"):
        loaded = pyadapt.load(build("llama"), tmp_path)
    assert "another weight than the base model" in caplog.text
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    batch = model_batch("llama")
    assert_near(loaded(**batch).logits, theirs(**batch).logits, "model")
    caplog.clear()
    pyadapt.load(theirs.unload(), tmp_path)
    assert not caplog.text


def test_a_base_weight_of_another_size_is_refused(tmp_path):
    model = with_targets("embed_tokens")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, key: tensors[key][:60].clone()}, tmp_path / FILE)
    fresh = build("llama")
    before = snapshot(fresh)
    with pytest.raises(AdapterFileError, match=r"misshapen: .*embed_tokens\.base_layer\.weight is \(60, 24\)"):
        pyadapt.load(fresh, tmp_path)
    assert snapshot(fresh) == before


@pytest.mark.parametrize("targets", [("q_proj",), ("embed_tokens", "q_proj")])
def test_a_resized_vocabulary(targets, tmp_path):
    """peft writes both embeddings then, and whoever loads the file needs the new rows."""
    build("llama").save_pretrained(tmp_path / "base")
    load = type(build("llama")).from_pretrained
    model = load(tmp_path / "base").eval()
    model.resize_token_embeddings(70, mean_resizing=False)
    with_targets(*targets, model=model)
    batch = model_batch("llama")
    batch["input_ids"][:, 1] = 68
    model.save_pretrained(tmp_path / "ours")

    def resized():
        torch.manual_seed(77)
        fresh = load(tmp_path / "base").eval()
        fresh.resize_token_embeddings(70, mean_resizing=False)
        return fresh

    theirs = peft.PeftModel.from_pretrained(resized(), tmp_path / "ours").eval()
    if targets == ("q_proj",):
        assert_near(theirs(**batch).logits, model(**batch).logits, "model")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / which / FILE) for which in ("ours", "theirs"))
    assert ours.keys() == again.keys()
    loaded = pyadapt.load(resized(), tmp_path / "theirs")
    assert_near(loaded(**batch).logits, theirs(**batch).logits, "model")
    with pytest.raises(AdapterFileError, match="misshapen"):
        pyadapt.load(load(tmp_path / "base"), tmp_path / "ours")


def test_several_adapters():
    model = wrapped(torch.float64)
    model.add_adapter("second", LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    plain, first = net(torch.float64)(IDS), model(IDS)
    model.set_adapter("second")
    second = model(IDS)
    model.set_adapter(["default", "second"])
    both = model(IDS)
    assert_near(both - plain, first + second - 2 * plain, "merged")
    model.merge_adapter()
    assert_near(model(IDS), both, "merged")
    model.unmerge_adapter()
    mixed = model(IDS, adapter_names=["second", "__base__"])
    assert_near(mixed[0], second[0], "layer")
    assert_near(mixed[1], plain[1], "layer")


def test_16_bit():
    model = wrapped(torch.bfloat16)
    assert model[0].adapters["default"].lora_embedding_A.dtype == torch.float32
    y, exact = model[0](IDS), wrapped(torch.bfloat16).double()[0](IDS)
    assert y.dtype == torch.bfloat16
    assert_close(y, exact, "product", torch.bfloat16)


def test_compiles_in_one_piece():
    model = wrapped(scale=2.0, padding_idx=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(IDS), model(IDS), "layer")
    compiled(IDS).square().sum().backward()
    grad = model[0].adapters["default"].lora_embedding_A.grad.clone()
    model.zero_grad()
    model(IDS).square().sum().backward()
    assert_near(model[0].adapters["default"].lora_embedding_A.grad, grad, "gradient")


def test_refused():
    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids + 2)

    cases = [
        (net(), {"lora_bias": True}, r"0 \(Embedding\): lora_bias: B of an embedding has no bias"),
        (nn.Sequential(Shifted(11, 6)), {}, "'0' is a Shifted, which no adapter can be put on"),
        (nn.Sequential(nn.EmbeddingBag(11, 6)), {}, "'0' is a EmbeddingBag"),
    ]
    for model, options, message in cases:
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            pyadapt.wrap(model, LoraConfig(target_modules=["0"], **options))
        assert snapshot(model) == before


def test_plan():
    (row,) = pyadapt.plan(net(), LoraConfig(target_modules=["0"], r=4)).layers
    assert (row.base, row.out_features, row.in_features, row.rank) == ("embedding", 11, 6, 4)
    assert row.shapes == {"lora_embedding_A": (4, 11), "lora_embedding_B": (6, 4)}
    json.dumps(row.as_dict())


def test_gemma_with_its_scale():
    """The real class, whose embedding multiplies by sqrt(hidden size)."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=67, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    plain = copy.deepcopy(model)
    batch = model_batch("llama")
    with_targets("embed_tokens", model=model)
    twin = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["embed_tokens"], r=4)).eval()
    copy_adapter_to_peft(model, twin)
    expected = model(**batch).logits
    assert_near(twin(**batch).logits, expected, "model")
    assert_near(pyadapt.merge(model)(**batch).logits, expected, "merged")
