"""Other weights in the place of an adapter's, without wrapping or compiling again."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from models import assert_near, build, model_batch, snapshot
from safetensors.torch import load_file, save_file

import pyadapt
from pyadapt import AdapterFileError, LoraConfig

OLD = {"r": 5, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def saved(folder, family="llama", **config):
    """An adapter in files, and the logits of a model that loaded it."""
    torch.manual_seed(7)
    config = {**OLD, "init_lora_weights": False, **config}
    model = pyadapt.wrap(build(family), LoraConfig(**config))
    model.save_pretrained(folder)
    loaded = pyadapt.load(build(family), folder)
    with torch.no_grad():
        return loaded(**model_batch(family)).logits


def at_work(family="llama", **config):
    return pyadapt.wrap(build(family), LoraConfig(**{**OLD, "init_lora_weights": False, **config})).eval()


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"r": 2}, True),
        ({"lora_alpha": 3}, True),
        ({"r": 3, "use_rslora": True, "alpha_pattern": {"q_proj": 30}}, True),
        ({"target_modules": ["q_proj"]}, True),
        ({"r": 8}, False),
        ({"rank_pattern": {"up_proj": 6}}, False),
        ({"target_modules": ["q_proj", "down_proj"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
    ],
    ids=str,
)
def test_the_new_weights_answer(tmp_path, changes, fits):
    expected = saved(tmp_path, **changes)
    model = at_work()
    batch = model_batch("llama")
    before = {name: id(p) for name, p in model.named_parameters()}
    assert model.hotswap_adapter(tmp_path) is fits
    with torch.no_grad():
        assert_near(model(**batch).logits, expected, "model")
    if fits:
        assert {name: id(p) for name, p in model.named_parameters()} == before
    assert model.active_adapters == ["default"]
    assert not any("_next" in name for name, _ in model.named_parameters())
    # What is saved now is what answers.
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert_near(pyadapt.load(build("llama"), tmp_path / "again")(**batch).logits, expected, "model")


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert", "vit"])
def test_every_family(tmp_path, family):
    targets = {"gpt2": ["c_attn"], "t5": ["q", "v"], "bert": ["query"], "vit": ["q_proj"]}[family]
    expected = saved(tmp_path, family, r=3, target_modules=targets)
    model = at_work(family, target_modules=targets)
    assert model.hotswap_adapter(tmp_path)
    with torch.no_grad():
        assert_near(model(**model_batch(family)).logits, expected, "model")


def test_a_compiled_model_is_not_compiled_again(tmp_path):
    expected = saved(tmp_path, r=2, lora_alpha=7)
    model = at_work()
    batch = model_batch("llama")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(**batch)
        compiled_once = counter.frame_count
        pyadapt.hotswap_adapter(compiled, tmp_path, adapter_name="default")
        assert_near(compiled(**batch).logits, expected, "model")
    assert counter.frame_count == compiled_once


def test_padding_makes_room(tmp_path):
    expected = saved(tmp_path, r=8, lora_alpha=3)
    model = at_work(rank_pattern={"q_proj": 3}, use_rslora=True)
    batch = model_batch("llama")
    with torch.no_grad():
        before = model(**batch).logits
        pyadapt.prepare_model_for_compiled_hotswap(model, target_rank=9)
        assert_near(model(**batch).logits, before, "model")
        assert {p.shape[0] for name, p in model.named_parameters() if name.endswith("lora_A")} == {9}
        assert model.hotswap_adapter(tmp_path)
        assert_near(model(**batch).logits, expected, "model")
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert_near(pyadapt.load(build("llama"), tmp_path / "again")(**batch).logits, expected, "model")


def test_the_same_as_peft(tmp_path):
    import peft
    from peft.utils.hotswap import hotswap_adapter

    saved(tmp_path / "old")
    saved(tmp_path / "new", r=5, lora_alpha=3)
    twin = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "old").eval()
    hotswap_adapter(twin, tmp_path / "new", adapter_name="default")
    model = pyadapt.load(build("llama"), tmp_path / "old")
    model.hotswap_adapter(tmp_path / "new")
    batch = model_batch("llama")
    with torch.no_grad():
        assert_near(model(**batch).logits, twin(**batch).logits, "model")


def test_an_adapter_with_a_trained_head(tmp_path):
    expected = saved(tmp_path, "bert", target_modules=["query"], task_type="SEQ_CLS", r=2)
    model = at_work("bert", target_modules=["query"], task_type="SEQ_CLS")
    with torch.no_grad():
        model.classifier.copies["default"].weight += 1
        assert model.hotswap_adapter(tmp_path)
        assert_near(model(**model_batch("bert")).logits, expected, "model")


def test_damaged_files_change_nothing(tmp_path):
    saved(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights, metadata={"format": "pt"})
    model = at_work()
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="missing"):
        model.hotswap_adapter(tmp_path)
    assert snapshot(model) == before


def test_refusals(tmp_path):
    saved(tmp_path)
    model = at_work()
    with pytest.raises(ValueError, match="no adapter is called 'other'"):
        model.hotswap_adapter(tmp_path, "other")
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be padded to rank 4: it has"):
        model.pad_ranks(4)
    assert snapshot(model) == before
    assert list(model.peft_config) == ["default"]
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="default is merged"):
        model.hotswap_adapter(tmp_path)
