"""`trainable_token_indices`: some rows of an embedding, against peft; a tied head follows them."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from models import VOCABULARY, assert_near, build, copy_adapter_to_peft, model_batch, snapshot, tied_llama
from safetensors.torch import load_file
from torch import nn

import pyadapt
from pyadapt import LoraConfig
from pyadapt.files import AdapterFileError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
]
FILE = "adapter_model.safetensors"
# Of the batch, so that they are seen; not sorted.
ROWS = [41, 7, 0, 66, 23]
KINDS = ["llama", "tied", "gpt2", "t5"]
TARGETS = {"llama": "q_proj", "tied": "q_proj", "gpt2": "c_attn", "t5": "q"}
EMBEDDING = {"llama": "model.embed_tokens", "tied": "model.embed_tokens", "gpt2": "transformer.wte", "t5": "shared"}


def plain(kind, dtype=torch.float32):
    return tied_llama(dtype=dtype) if kind == "tied" else build(kind, dtype=dtype)


def batch_of(kind):
    batch = model_batch("llama" if kind == "tied" else kind)
    batch["input_ids"][0, :4] = torch.tensor([41, 7, 66, 23])
    return batch


def config_of(kind, rows=ROWS, **options):
    return LoraConfig(
        target_modules=[TARGETS[kind]], r=4, init_lora_weights=False, trainable_token_indices=rows, **options
    )


def wrapped(kind, rows=ROWS, dtype=torch.float32, **options):
    model = pyadapt.wrap(plain(kind, dtype), config_of(kind, rows, **options))
    shake(model)
    return model


def shake(model, name="default"):
    """Give the rows other values than those they began with."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(f"adapters.{name}.rows"):
                parameter.add_(torch.randn_like(parameter))


def twin_of(model, kind, rows=ROWS, **options):
    config = peft.LoraConfig(target_modules=[TARGETS[kind]], r=4, trainable_token_indices=rows, **options)
    twin = peft.get_peft_model(plain(kind), config)
    copy_adapter_to_peft(model, twin)
    return twin.eval()


def logits(model, kind):
    return model(**batch_of(kind)).logits


def unit_of(model, kind, name="default"):
    return model.get_submodule(EMBEDDING[kind]).adapters[name]


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_peft(kind):
    model = wrapped(kind)
    twin = twin_of(model, kind)
    expected = twin(**batch_of(kind))
    out = model(**batch_of(kind))
    assert_near(out.logits, expected.logits, "model")
    out.loss.backward()
    expected.loss.backward()
    theirs = twin.base_model.model.get_submodule(EMBEDDING[kind]).token_adapter.trainable_tokens_delta["default"]
    assert_near(unit_of(model, kind).rows.grad, theirs.grad, "gradient")
    assert bool(theirs.grad.any())
    assert model.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_nothing_changes(kind):
    base, model = plain(kind), pyadapt.wrap(plain(kind), config_of(kind))
    for path, module in model.named_modules():
        if path.endswith("adapters.default") and "lora_B" in dict(module.named_parameters()):
            nn.init.zeros_(module.lora_B)
    assert_near(logits(model, kind), logits(base, kind), "model")
    assert torch.equal(unit_of(model, kind).rows, base.get_input_embeddings().weight[ROWS])


@pytest.mark.parametrize("kind", KINDS)
def test_files_go_both_ways(kind, tmp_path):
    model = wrapped(kind)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain(kind), tmp_path / "ours").eval()
    assert_near(logits(theirs, kind), logits(model, kind), "model")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / which / FILE) for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in again.items()}
    key = f"base_model.model.{EMBEDDING[kind]}.token_adapter.trainable_tokens_delta"
    assert torch.equal(ours[key], unit_of(model, kind).rows)
    assert [key for key in ours if "token_adapter" in key] == [key]
    assert torch.equal(logits(pyadapt.load(plain(kind), tmp_path / "theirs"), kind), logits(model, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind, tmp_path):
    model = wrapped(kind)
    expected, table = logits(model, kind), model.get_input_embeddings().weight.clone()
    model.merge_adapter()
    assert_near(logits(model, kind), expected, "merged")
    assert torch.equal(model.get_input_embeddings().weight[ROWS], unit_of(model, kind).rows)
    model.unmerge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert torch.equal(logits(model, kind), expected)
    pyadapt.export(model, tmp_path)
    again = type(plain(kind)).from_pretrained(tmp_path).eval()
    assert_near(logits(again, kind), expected, "merged")
    merged = pyadapt.merge(model)
    assert_near(logits(merged, kind), expected, "merged")
    tied = kind != "llama"
    for one in (merged, again):
        assert (one.get_input_embeddings().weight is one.get_output_embeddings().weight) == tied
        assert one.config.tie_word_embeddings == tied
    rest = [i for i in range(VOCABULARY) if i not in ROWS]
    assert torch.equal(merged.get_input_embeddings().weight[rest], table[rest])


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_disabled_and_unwrapped(kind):
    model = wrapped(kind)
    expected = logits(plain(kind), kind)
    with model.disable_adapter():
        assert torch.equal(logits(model, kind), expected)
    base = pyadapt.unwrap(model)
    assert torch.equal(logits(base, kind), expected)
    assert {name: type(m) for name, m in base.named_modules()} == {
        name: type(m) for name, m in plain(kind).named_modules()
    }


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_several_adapters(kind):
    model = wrapped(kind)
    model.add_adapter("second", config_of(kind, [5, 9]))
    shake(model, "second")
    model.add_adapter("third", config_of(kind, [9, 41]))
    first = logits(model, kind)
    model.set_adapter("second")
    second = logits(model, kind)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"model\.embed_tokens: adapters 'default' and 'third' both train token 41"):
        model.set_adapter(["default", "third"])
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model, kind), second)
    model.set_adapter("default")
    assert torch.equal(logits(model, kind), first)
    mixed = model(input_ids=batch_of(kind)["input_ids"], adapter_names=["default", "second"]).logits
    assert_near(mixed[0], first[0], "model")
    assert_near(mixed[1], second[1], "model")
    with pytest.raises(ValueError, match="both train token 9"):
        model.merge_adapter(["second", "third"])
    model.set_adapter(["default", "second"])
    both = logits(model, kind)
    model.merge_adapter()
    assert_near(logits(model, kind), both, "merged")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert_near(logits(model, kind), second, "model")


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_counts_are_those_of_peft(kind):
    model = wrapped(kind)
    assert model.get_nb_trainable_parameters() == twin_of(model, kind).get_nb_trainable_parameters()
    plan = pyadapt.plan(plain(kind), config_of(kind))
    assert (plan.trainable_parameters, plan.all_parameters) == model.get_nb_trainable_parameters()
    row = next(row for row in plan.layers if row.path == "model.embed_tokens")
    assert row.shapes == {"token_adapter.trainable_tokens_delta": (5, 24)}
    assert row.rank == 0
    assert ("lm_head" in [row.path for row in plan.layers]) == (kind == "tied")
    assert "model.embed_tokens" in str(plan)


def test_only_the_rows_train():
    model = wrapped("tied").train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch_of("tied")).loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".adapters." in name}
    assert "model.embed_tokens.adapters.default.rows" in changed


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_rows_of_the_head_alone(kind, tmp_path):
    """On an untied model, as in peft; on a tied one it would have to be both."""
    config = config_of(kind, {"lm_head": [3, 5]})
    if kind == "tied":
        model = plain(kind)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"lm_head would be trained in some rows, but .* model\.embed_tokens"):
            pyadapt.wrap(model, config)
        assert snapshot(model) == before
        return
    model = pyadapt.wrap(plain(kind), config)
    shake(model)
    twin = twin_of(model, kind, {"lm_head": [3, 5]})
    assert_near(logits(model, kind), logits(twin, kind), "model")
    expected = logits(model, kind)
    assert_near(logits(pyadapt.merge(model), kind), expected, "merged")


def test_a_file_that_trains_rows_of_a_tied_head_alone(tmp_path, caplog):
    """peft makes such files: they are loaded as they are, and merging unties."""
    theirs = peft.get_peft_model(
        plain("tied"), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5]})
    )
    with torch.no_grad():
        theirs.base_model.model.lm_head.token_adapter.trainable_tokens_delta["default"].add_(1)
    theirs.save_pretrained(tmp_path)
    model = pyadapt.load(plain("tied"), tmp_path)
    assert "merging unties them" in caplog.text
    expected = logits(model, "tied")
    assert_near(expected, logits(theirs.eval(), "tied"), "model")
    merged = pyadapt.merge(model)
    assert_near(logits(merged, "tied"), expected, "merged")
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.get_input_embeddings().weight, plain("tied").get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_different_rows_of_both(kind, tmp_path):
    """Independent of each other, as in peft, and untied at a merge."""
    rows = {"embed_tokens": [41, 7], "lm_head": [7, 9, 1]}
    model = wrapped(kind, rows)
    twin = twin_of(model, kind, rows)
    expected = logits(model, kind)
    assert_near(expected, logits(twin, kind), "model")
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(pyadapt.load(plain(kind), tmp_path / "ours"), kind), expected)
    pyadapt.export(model, tmp_path / "merged")
    again = type(plain(kind)).from_pretrained(tmp_path / "merged").eval()
    assert_near(logits(again, kind), expected, "merged")
    model.merge_adapter()
    assert_near(logits(model, kind), expected, "merged")
    model.unmerge_adapter()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")
    assert torch.equal(logits(model, kind), expected)
    merged = pyadapt.merge(model)
    assert_near(logits(merged, kind), expected, "merged")
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is False


def test_equal_rows_of_both_are_tied():
    rows = {"embed_tokens": [41, 7], "lm_head": [41, 7]}
    model = wrapped("tied", rows)
    assert model.lm_head.adapters["default"].rows is model.model.embed_tokens.adapters["default"].rows
    twin = twin_of(model, "tied", rows)
    assert_near(logits(model, "tied"), logits(twin, "tied"), "model")


def test_ensure_weight_tying_for_rows():
    model = wrapped("tied", {"lm_head": [41, 7]}, ensure_weight_tying=True)
    assert model.lm_head.adapters["default"].rows is model.model.embed_tokens.adapters["default"].rows
    assert model.peft_config["default"].trainable_token_indices == {"model.embed_tokens": [41, 7]}
    with pytest.raises(ValueError, match="name different trainable_token_indices"):
        wrapped("tied", {"lm_head": [1], "embed_tokens": [2]}, ensure_weight_tying=True)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 0.7}], ids=str)
def test_options_of_the_embedding(options):
    """The embedding with the rows written into it is the oracle, with the gradients of those rows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 6, **options), nn.Linear(6, 4))
    written = copy.deepcopy(net)
    config = LoraConfig(target_modules=["1"], trainable_token_indices={"0": [9, 3, 5]})
    model = pyadapt.wrap(net, config)
    shake(model)
    unit = model[0].adapters["default"]
    with torch.no_grad():
        written[0].weight[[9, 3, 5]] = unit.rows
    ids = torch.tensor([[0, 3, 3, 5], [9, 1, 3, 0]])
    assert_near(model(ids), written(ids), "layer")
    model(ids).square().sum().backward()
    written(ids).square().sum().backward()
    assert_near(unit.rows.grad, written[0].weight.grad[[9, 3, 5]], "gradient")


def test_gemma_with_its_scale():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=67, max_position_embeddings=32, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    base = Gemma3ForCausalLM(config).eval()
    model = pyadapt.wrap(copy.deepcopy(base), config_of("tied"))
    shake(model)
    twin = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=4, trainable_token_indices=ROWS))
    copy_adapter_to_peft(model, twin)
    expected = logits(model, "tied")
    assert_near(logits(twin.eval(), "tied"), expected, "model")
    assert_near(logits(pyadapt.merge(model), "tied"), expected, "merged")


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_16_bit(kind):
    model = wrapped(kind, dtype=torch.bfloat16)
    assert unit_of(model, kind).rows.dtype == torch.float32
    expected = logits(model, kind)
    model.merge_adapter()
    assert_near(logits(model, kind), expected, "merged")


def test_a_quantised_head():
    """The rows begin as those that the int8 head multiplies by."""
    from pyadapt.base.int8 import make_int8

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 9))
    make_int8(net[1])
    x = torch.randn(3, 5)
    expected = net(x)
    model = pyadapt.wrap(net, LoraConfig(target_modules=["0"], trainable_token_indices={"1": [8, 2]}))
    assert_near(model(x), expected, "layer")
    with torch.no_grad():
        model[1].adapters["default"].rows.add_(1)
    moved = model(x)
    rest = [0, 1, 3, 4, 5, 6, 7]
    assert_near(moved[:, rest], expected[:, rest], "layer")
    assert not torch.allclose(moved[:, [2, 8]], expected[:, [2, 8]])


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_compiles_in_one_piece(kind):
    model = wrapped(kind)
    batch = batch_of(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(**batch, use_cache=False)
    expected = model(**batch, use_cache=False)
    assert_near(out.logits, expected.logits, "model")
    out.loss.backward()
    grad = unit_of(model, kind).rows.grad.clone()
    model.zero_grad()
    expected.loss.backward()
    assert_near(unit_of(model, kind).rows.grad, grad, "gradient")


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_generating(kind):
    model = wrapped(kind)
    ids = batch_of(kind)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids, **options)
    assert torch.equal(pyadapt.merge(model).generate(ids, **options), generated)


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_resized_vocabulary(kind, tmp_path):
    """peft writes the whole table then; both ways, with the new rows from there."""
    plain(kind).save_pretrained(tmp_path / "base")

    def resized(seed):
        torch.manual_seed(seed)
        fresh = type(plain(kind)).from_pretrained(tmp_path / "base").eval()
        fresh.resize_token_embeddings(70, mean_resizing=False)
        return fresh

    model = pyadapt.wrap(resized(1), config_of(kind, [67, 69]))
    shake(model)
    batch = batch_of(kind)
    batch["input_ids"][1, :3] = torch.tensor([67, 68, 69])
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(resized(2), tmp_path / "ours").eval()
    assert_near(theirs(**batch).logits, expected, "model")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / which / FILE) for which in ("ours", "theirs"))
    more = {"base_model.model.lm_head.token_adapter.trainable_tokens_delta"} if kind == "tied" else set()
    assert again.keys() - ours.keys() == more
    assert ours.keys() <= again.keys()
    loaded = pyadapt.load(resized(3), tmp_path / "theirs")
    assert_near(loaded(**batch).logits, expected, "model")


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_loading_in_place_of_drawing(kind, tmp_path):
    model = wrapped(kind)
    model.save_pretrained(tmp_path)
    loaded = pyadapt.load(plain(kind), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded, kind), logits(model, kind))


def test_no_weighted_sum_of_rows():
    """Rows hold values, of which there is no sum with those of others."""
    model = wrapped("tied")
    model.add_adapter("second", config_of("tied", [5, 9]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="trainable_token_indices"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    assert snapshot(model) == before


def test_copies_and_renames():
    model = wrapped("tied")
    expected = logits(model, "tied")
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, "tied"), expected)
    assert twin.lm_head.adapters["default"].rows is twin.model.embed_tokens.adapters["default"].rows
    model.rename_adapter("default", "other")
    assert torch.equal(logits(model, "tied"), expected)
    model.rescale(1.0)


def test_hotswap(tmp_path):
    model = wrapped("tied")
    other = wrapped("tied")
    shake(other)
    other.save_pretrained(tmp_path)
    rows = unit_of(model, "tied").rows
    assert model.hotswap_adapter(tmp_path)
    assert unit_of(model, "tied").rows is rows
    assert_near(logits(model, "tied"), logits(other, "tied"), "model")


BAD = [
    ([67], r"\[67\] ids for model\.embed_tokens, which has rows 0 to 66; .*resize_token_embeddings"),
    ([-1, 3], r"\[-1\] ids"),
    ([3, 3, 5], r"\[3\] named more than once"),
    ([], "no ids for"),
    (["a"], r"\['a'\] ids"),
    ({"nothing": [1]}, "'nothing' is not in this model"),
    ({}, "nothing is not in this model"),
    ({"norm": [1]}, r"model\.norm is a LlamaRMSNorm, of which no rows"),
]


@pytest.mark.parametrize(("rows", "message"), BAD, ids=lambda value: str(value)[:20])
def test_bad_input(rows, message):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pyadapt.wrap(model, config_of("llama", rows))
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_not_beside_another_adapter_on_the_embedding(kind):
    """peft refuses both as well."""
    refused = [
        LoraConfig(target_modules=["q_proj", "embed_tokens"], trainable_token_indices=ROWS),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], trainable_token_indices=ROWS),
    ]
    for config in refused:
        model = plain(kind)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"embed_tokens"):
            pyadapt.wrap(model, config)
        assert snapshot(model) == before
    model = wrapped(kind)
    before = snapshot(model)
    both = LoraConfig(target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(ValueError, match="another adapter trains rows of"):
        model.add_adapter("second", both)
    assert snapshot(model) == before
    model = pyadapt.wrap(plain(kind), both)
    with pytest.raises(ValueError, match="is adapted as well"):
        model.add_adapter("second", config_of(kind))


def test_a_file_without_the_rows(tmp_path):
    from safetensors.torch import save_file

    wrapped("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({key: value for key, value in tensors.items() if "token_adapter" not in key}, tmp_path / FILE)
    with pytest.raises(AdapterFileError, match=r"missing: .*embed_tokens\.token_adapter\.trainable_tokens_delta"):
        pyadapt.load(build("llama"), tmp_path)
