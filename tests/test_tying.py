"""Weights that several modules read: refused, tied with `ensure_weight_tying`, or independent and untied at a merge."""

from __future__ import annotations

import copy
import logging

import peft
import pytest
import torch
from models import assert_near, build, copy_adapter_to_peft, model_batch, snapshot, tied_llama
from safetensors.torch import load_file, save_file
from torch import nn

import pyadapt
from pyadapt import LoraConfig
from pyadapt.files import AdapterFileError
from pyadapt.tying import tied_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules are added"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
]
FILE = "adapter_model.safetensors"
KINDS = ["tied", "gpt2", "t5"]
# The embedding, the other readers of its weight, and a layer beside them.
EMBEDDING = {"tied": "model.embed_tokens", "gpt2": "transformer.wte", "t5": "shared"}
OTHERS = {
    "tied": ["lm_head"],
    "gpt2": ["lm_head"],
    "t5": ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
}
BESIDE = {"tied": "q_proj", "gpt2": "c_attn", "t5": "q"}


def plain(kind, dtype=torch.float32):
    return tied_llama(dtype=dtype) if kind == "tied" else build(kind, dtype=dtype)


def batch_of(kind):
    return model_batch("llama" if kind == "tied" else kind)


def logits(model, kind):
    return model(**batch_of(kind)).logits


def wrapped(kind, targets, dtype=torch.float32, model=None, **options):
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    model = pyadapt.wrap(model or plain(kind, dtype), LoraConfig(target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.mul_(0.3)
    return model


def all_readers(kind):
    return [EMBEDDING[kind], *OTHERS[kind]]


def tied(kind, dtype=torch.float32, **options):
    return wrapped(kind, [EMBEDDING[kind], BESIDE[kind]], dtype, ensure_weight_tying=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_are_found_by_identity(kind):
    assert all_readers(kind) in [sorted(paths, key=all_readers(kind).index) for paths in tied_weights(plain(kind))]
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    assert list(tied_weights(net)) == []
    net[2].weight = net[0].weight
    assert list(tied_weights(net)) == [["0", "2"]]


ONE_SIDED = [
    ({"target_modules": ["{embedding}"]}, "{embedding} would be adapted"),
    ({"target_modules": ["lm_head"]}, "lm_head would be adapted"),
    ({"target_modules": ["{beside}"], "modules_to_save": ["{embedding}"]}, "{embedding} would be trained whole"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "message"), ONE_SIDED, ids=["embedding", "head", "whole"])
def test_one_side_alone_is_refused(kind, options, message):
    names = {"embedding": EMBEDDING[kind], "beside": BESIDE[kind]}
    config = LoraConfig(**{key: [value.format(**names) for value in values] for key, values in options.items()})
    model = plain(kind)
    before = snapshot(model)
    for attempt in (pyadapt.wrap, pyadapt.plan):
        with pytest.raises(ValueError, match=message.format(**names)) as error:
            attempt(model, config)
        assert "ensure_weight_tying=True" in str(error.value)
    assert snapshot(model) == before
    model = wrapped(kind, [BESIDE[kind]])
    before = snapshot(model)
    with pytest.raises(ValueError, match="ensure_weight_tying=True"):
        model.add_adapter("second", config)
    assert snapshot(model) == before


def test_an_untied_model_is_left_alone(caplog):
    for targets in (["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]):
        pyadapt.wrap(build("llama"), LoraConfig(target_modules=targets))
    assert not caplog.text
    pyadapt.wrap(build("llama"), LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    assert "so nothing is tied" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["embedding", "head", "pattern"])
def test_tied_adapters_are_one(kind, by):
    named = {"embedding": [EMBEDDING[kind]], "head": ["lm_head"], "pattern": r"lm_head|.*embed_tokens|shared|.*wte"}
    model = wrapped(kind, named[by], ensure_weight_tying=True)
    first = model.get_submodule(EMBEDDING[kind]).adapters["default"]
    for path in OTHERS[kind]:
        unit = model.get_submodule(path).adapters["default"]
        assert unit.lora_embedding_A is first.lora_embedding_A
        assert unit.lora_embedding_B is first.lora_embedding_B
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == 4 * (67 + 24) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = pyadapt.plan(plain(kind), LoraConfig(target_modules=named[by], r=4, ensure_weight_tying=True))
    assert (plan.trainable_parameters, plan.all_parameters) == model.get_nb_trainable_parameters()
    assert {row.path: row.source for row in plan.layers} == {
        EMBEDDING[kind]: None,
        **dict.fromkeys(OTHERS[kind], EMBEDDING[kind]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_tied_model_is_that_with_the_merged_weight(kind, tmp_path):
    """In fp64 the oracle is the model whose one weight is W + s A'B'."""
    model = tied(kind, torch.float64)
    expected = logits(model, kind)
    unit = model.get_submodule(EMBEDDING[kind]).adapters["default"]
    delta = (unit.lora_embedding_B @ unit.lora_embedding_A).t() * unit.scaling
    table = model.get_input_embeddings().weight.clone()
    model.merge_adapter()
    for path in all_readers(kind):
        assert model.get_submodule(path).weight is model.get_input_embeddings().weight
    assert_near(model.get_input_embeddings().weight, table + delta, "merged")
    assert_near(logits(model, kind), expected, "merged")
    model.unmerge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert torch.equal(logits(model, kind), expected)
    with model.disable_adapter():
        assert_near(logits(model, kind), logits(plain(kind, torch.float64), kind), "model")
    pyadapt.export(model, tmp_path)
    again = type(plain(kind)).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_near(logits(again, kind), expected, "merged")
    merged = pyadapt.merge(model)
    assert_near(logits(merged, kind), expected, "merged")
    for one in (merged, again):
        assert one.config.tie_word_embeddings
        assert len({id(one.get_submodule(path).weight) for path in all_readers(kind)}) == 1


def test_values_and_gradients_of_a_tied_adapter_are_those_of_peft():
    """peft gives the head a second view of the same storage: its gradient is the sum of the two."""
    model = wrapped("tied", ["embed_tokens", "q_proj"], ensure_weight_tying=True)
    config = peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=4, lora_alpha=6, ensure_weight_tying=True)
    twin = peft.get_peft_model(plain("tied"), config).eval()
    copy_adapter_to_peft(model, twin)
    out, expected = model(**batch_of("tied")), twin(**batch_of("tied"))
    assert_near(out.logits, expected.logits, "model")
    out.loss.backward()
    expected.loss.backward()
    unit = model.model.embed_tokens.adapters["default"]
    embedding, head = twin.base_model.model.model.embed_tokens, twin.base_model.model.lm_head
    of_A = embedding.lora_embedding_A["default"].grad + head.lora_B["default"].weight.grad.t()
    of_B = embedding.lora_embedding_B["default"].grad + head.lora_A["default"].weight.grad.t()
    assert_near(unit.lora_embedding_A.grad, of_A, "gradient")
    assert_near(unit.lora_embedding_B.grad, of_B, "gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["embedding", "head"])
def test_tied_files_go_both_ways(kind, by, tmp_path):
    target = EMBEDDING[kind] if by == "embedding" else "lm_head"
    model = wrapped(kind, [target, BESIDE[kind]], ensure_weight_tying=True)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain(kind), tmp_path / "ours").eval()
    assert_near(logits(theirs, kind), logits(model, kind), "model")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / which / FILE) for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in again.items()}
    for key in ours:
        assert torch.equal(ours[key], again[key]), key
    loaded = pyadapt.load(plain(kind), tmp_path / "theirs")
    assert_near(logits(loaded, kind), logits(model, kind), "model")
    assert (
        loaded.lm_head.adapters["default"].lora_embedding_A
        is loaded.get_submodule(EMBEDDING[kind]).adapters["default"].lora_embedding_A
    )


def test_tied_tensors_that_differ_are_refused(tmp_path):
    tied("tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors["base_model.model.lm_head.lora_A.weight"][0, 0] += 1
    save_file(tensors, tmp_path / FILE)
    model = plain("tied")
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=r"differs: .*lm_head\.lora_A\.weight is a second copy of a tied weight"):
        pyadapt.load(model, tmp_path)
    assert snapshot(model) == before


def test_a_file_that_ties_without_saying_so_twice(tmp_path):
    """peft does not see that GPT-2's embedding is tied: its file holds the embedding's adapter alone."""
    config = peft.LoraConfig(target_modules=["wte"], r=4, ensure_weight_tying=True, init_lora_weights=False)
    theirs = peft.get_peft_model(plain("gpt2"), config)
    theirs.save_pretrained(tmp_path)
    assert not any("lm_head" in key for key in load_file(tmp_path / FILE))
    model = pyadapt.load(plain("gpt2"), tmp_path)
    unit = model.lm_head.adapters["default"]
    assert torch.equal(unit.lora_embedding_A, theirs.base_model.model.transformer.wte.lora_embedding_A["default"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["embedding", "head"])
def test_tied_modules_to_save(kind, name, tmp_path):
    saved = [EMBEDDING[kind] if name == "embedding" else "lm_head"]
    model = wrapped(kind, [BESIDE[kind]], modules_to_save=saved, ensure_weight_tying=True)
    copies = [model.get_submodule(path).copies["default"] for path in all_readers(kind)]
    assert len({id(one.weight) for one in copies}) == 1
    assert copies[0].weight is not model.get_input_embeddings().weight
    with torch.no_grad():
        copies[0].weight.add_(torch.randn_like(copies[0].weight))
    plan = pyadapt.plan(plain(kind), model.peft_config["default"])
    assert (plan.trainable_parameters, plan.all_parameters) == model.get_nb_trainable_parameters()
    expected = logits(model, kind)
    assert not torch.allclose(expected, logits(plain(kind), kind))

    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain(kind), tmp_path / "ours").eval()
    # peft makes every module that follows a linear layer, also T5's embeddings, and cannot run it then.
    if kind != "t5":
        assert_near(logits(theirs, kind), expected, "model")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / which / FILE) for which in ("ours", "theirs"))
    assert ours.keys() == again.keys()
    loaded = pyadapt.load(plain(kind), tmp_path / "theirs")
    assert_near(logits(loaded, kind), expected, "model")
    assert loaded.lm_head.copies["default"].weight is loaded.get_submodule(EMBEDDING[kind]).copies["default"].weight

    pyadapt.export(model, tmp_path / "merged")
    read = type(plain(kind)).from_pretrained(tmp_path / "merged").eval()
    merged = pyadapt.merge(model)
    for one in (merged, read):
        assert_near(logits(one, kind), expected, "merged")
        assert one.config.tie_word_embeddings
        assert len({id(one.get_submodule(path).weight) for path in all_readers(kind)}) == 1


def test_gradients_of_tied_modules_to_save_are_those_of_peft():
    model = wrapped("tied", ["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    config = peft.LoraConfig(
        target_modules=["q_proj"], r=4, lora_alpha=6, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    twin = peft.get_peft_model(plain("tied"), config).eval()
    copy_adapter_to_peft(model, twin)
    model(**batch_of("tied")).loss.backward()
    twin(**batch_of("tied")).loss.backward()
    theirs = twin.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    assert_near(model.model.embed_tokens.copies["default"].weight.grad, theirs.grad, "gradient")


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_both_sides_named_are_independent(kind, tmp_path, caplog):
    model = wrapped(kind, all_readers(kind))
    assert "merging unties them" in caplog.text
    twin = peft.get_peft_model(plain(kind), peft.LoraConfig(target_modules=all_readers(kind), r=4, lora_alpha=6))
    keys = [key for key in model.get_adapter_state_dict() if "base_layer" not in key]
    peft.set_peft_model_state_dict(
        twin, {f"base_model.model.{key}": model.get_adapter_state_dict()[key].detach().clone() for key in keys}
    )
    expected = logits(model, kind)
    assert_near(expected, logits(twin.eval(), kind), "model")
    table = model.get_input_embeddings().weight
    before = table.clone()
    model.merge_adapter()
    assert_near(logits(model, kind), expected, "merged")
    assert torch.equal(table, before)
    model.unmerge_adapter()
    assert model.lm_head.weight is model.get_input_embeddings().weight is table
    assert torch.equal(logits(model, kind), expected)

    pyadapt.export(model, tmp_path)
    read = type(plain(kind)).from_pretrained(tmp_path).eval()
    merged = pyadapt.merge(model)
    for one in (merged, read):
        assert_near(logits(one, kind), expected, "merged")
        assert one.lm_head.weight is not one.get_input_embeddings().weight
        assert one.config.tie_word_embeddings is False


def test_a_file_of_one_side_is_loaded_and_told(tmp_path, caplog):
    """peft only warns when it makes such an adapter."""
    config = peft.LoraConfig(target_modules=["embed_tokens"], r=4, init_lora_weights=False)
    theirs = peft.get_peft_model(plain("tied"), config).eval()
    theirs.save_pretrained(tmp_path)
    model = pyadapt.load(plain("tied"), tmp_path)
    assert "The file has it so" in caplog.text
    expected = logits(model, "tied")
    assert_near(expected, logits(theirs, "tied"), "model")
    model.pad_ranks(6)
    assert model.hotswap_adapter(tmp_path)
    assert_near(logits(model, "tied"), expected, "model")
    head = model.lm_head.weight.clone()
    merged = pyadapt.merge(model)
    assert_near(logits(merged, "tied"), expected, "merged")
    assert torch.equal(merged.lm_head.weight, head)
    assert not torch.equal(merged.model.embed_tokens.weight, head)
    assert merged.config.tie_word_embeddings is False


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_trained_whole_alone(kind, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pyadapt"):
        model = wrapped(kind, [BESIDE[kind]], modules_to_save=["lm_head"])
    assert "merging gives it a weight of its own" in caplog.text
    with torch.no_grad():
        model.lm_head.copies["default"].weight.add_(torch.randn(67, 24))
    expected, table = logits(model, kind), model.get_input_embeddings().weight.clone()
    pyadapt.export(model, tmp_path)
    read = type(plain(kind)).from_pretrained(tmp_path).eval()
    merged = pyadapt.merge(model)
    for one in (merged, read):
        assert torch.equal(one.get_input_embeddings().weight, table)
        assert_near(logits(one, kind), expected, "merged")
    # T5's configuration has no word for untied weights: False would mean another scale of the head's input.
    assert merged.config.tie_word_embeddings == (kind == "t5")


def test_several_adapters_of_which_one_is_tied():
    """One tied, one independent: together they untie, each weight changed once."""
    model = tied("tied", torch.float64)
    config = LoraConfig(target_modules=["embed_tokens", "lm_head"], r=2, init_lora_weights=False)
    model.add_adapter("apart", config)
    first = logits(model, "tied")
    model.set_adapter(["default", "apart"])
    both = logits(model, "tied")
    assert not torch.allclose(first, both)
    model.merge_adapter()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert_near(logits(model, "tied"), both, "merged")
    model.unmerge_adapter()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_near(logits(model, "tied"), both, "merged")
    model.delete_adapter("apart")
    model.merge_adapter()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_near(logits(model, "tied"), first, "merged")
    mixed = model.unmerge_adapter() or model(input_ids=batch_of("tied")["input_ids"], adapter_names=["default"] * 2)
    assert_near(mixed.logits, first, "merged")


def test_linear_layers_that_share_a_weight():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match="0 would be adapted, but its weight is also that of 2"):
        pyadapt.wrap(net, LoraConfig(target_modules=["0"]))
    options = {"ensure_weight_tying": True, "lora_bias": True, "init_lora_weights": False}
    model = pyadapt.wrap(net, LoraConfig(target_modules=["0"], **options))
    with torch.no_grad():
        model[0].adapters["default"].lora_bias.normal_()
    x = torch.randn(3, 5).double()
    expected = model(x)
    model.merge_adapter()
    assert_near(model(x), expected, "merged")
    model.unmerge_adapter()
    assert_near(model(x), expected, "merged")
    merged = pyadapt.merge(model)
    assert merged[0].weight is merged[2].weight
    assert_near(merged(x), expected, "merged")


def test_what_cannot_be_tied():
    class Reader(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.table = weight

    embedding = nn.Embedding(7, 5)
    net = nn.Sequential(embedding, Reader(embedding.weight))
    with pytest.raises(ValueError, match=r"1 \(Reader\) reads the weight of 0 as well, but is no layer"):
        pyadapt.wrap(net, LoraConfig(target_modules=["0"], ensure_weight_tying=True))
    cases = [
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "use_dora: the magnitudes of"),
        ({"target_modules": ["embed_tokens"], "exclude_modules": ["lm_head"]}, "exclude_modules leaves out lm_head"),
        ({"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, "name them in the same way"),
    ]
    for options, message in cases:
        model = tied_llama()
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            pyadapt.wrap(model, LoraConfig(ensure_weight_tying=True, **options))
        assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_tied_training(kind):
    """Under dropout as well; the base stays as it is and the adapter's one pair of factors learns."""
    model = tied(kind, lora_dropout=0.1).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch_of(kind)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".adapters." in name}


def test_tied_compiles_in_one_piece():
    model = tied("tied")
    batch = batch_of("tied")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(**batch, use_cache=False), model(**batch, use_cache=False)
    assert_near(out.logits, expected.logits, "model")
    out.loss.backward()
    parameter = model.model.embed_tokens.adapters["default"].lora_embedding_A
    grad = parameter.grad.clone()
    model.zero_grad()
    expected.loss.backward()
    assert_near(parameter.grad, grad, "gradient")


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["adapter", "whole"])
def test_loading_in_place_of_drawing(options, tmp_path):
    model = tied("tied") if not options else wrapped("tied", ["q_proj"], ensure_weight_tying=True, **options)
    model.save_pretrained(tmp_path)
    loaded = pyadapt.load(plain("tied"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, "tied"), logits(model, "tied"))
    own = "adapters" if not options else "copies"
    of_head, of_embedding = (
        set(map(id, getattr(layer, own)["default"].parameters()))
        for layer in (loaded.lm_head, loaded.model.embed_tokens)
    )
    assert of_head == of_embedding


def test_weighted_sum_of_tied_adapters():
    model = tied("tied", torch.float64)
    config = LoraConfig(target_modules=["lm_head", "q_proj"], r=3, ensure_weight_tying=True, init_lora_weights=False)
    model.add_adapter("second", config)
    model.add_weighted_adapter(["default", "second"], [0.5, -0.7], "sum", combination_type="cat")
    one, other, total = (model.lm_head.adapters[name].delta() for name in ("default", "second", "sum"))
    assert_near(total, 0.5 * one - 0.7 * other, "merged")
    assert_near(model.model.embed_tokens.adapters["sum"].delta(), total, "merged")
    assert model.lm_head.adapters["sum"].source == "model.embed_tokens"


def test_saved_as_plain_lora(tmp_path):
    """Where other layers started from their weights, the ranks of the tied pair follow theirs."""
    model = wrapped("tied", ["embed_tokens", "q_proj"], init_lora_weights="pissa", ensure_weight_tying=True)
    model.save_pretrained(tmp_path, as_plain_lora=True)
    assert_near(logits(pyadapt.load(plain("tied"), tmp_path), "tied"), logits(model, "tied"), "model")
    theirs = peft.PeftModel.from_pretrained(plain("tied"), tmp_path).eval()
    assert_near(logits(theirs, "tied"), logits(model, "tied"), "model")


def test_copies_scaling_and_hotswap(tmp_path):
    model = tied("tied")
    twin = copy.deepcopy(model)
    assert (
        twin.lm_head.adapters["default"].lora_embedding_A
        is twin.model.embed_tokens.adapters["default"].lora_embedding_A
    )
    expected = logits(model, "tied")
    assert torch.equal(logits(twin, "tied"), expected)
    with model.rescaled(0.5):
        halved = logits(model, "tied")
        merged = pyadapt.merge(copy.deepcopy(model))
        assert_near(logits(merged, "tied"), halved, "merged")
    assert not torch.allclose(halved, expected)
    other = wrapped("tied", ["embed_tokens", "q_proj"], r=2, ensure_weight_tying=True)
    other.save_pretrained(tmp_path)
    factor = model.model.embed_tokens.adapters["default"].lora_embedding_A
    assert model.hotswap_adapter(tmp_path)
    assert model.model.embed_tokens.adapters["default"].lora_embedding_A is factor
    assert_near(logits(model, "tied"), logits(other, "tied"), "model")
    model.pad_ranks(8)
    assert_near(logits(model, "tied"), logits(other, "tied"), "model")
    assert (
        model.lm_head.adapters["default"].lora_embedding_A
        is model.model.embed_tokens.adapters["default"].lora_embedding_A
    )
