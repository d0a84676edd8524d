"""Models that accelerate has dispatched: layers in memory, on the CPU aside, on disk, or without values."""

from __future__ import annotations

import logging

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, attach_align_device_hook
from models import assert_near, build, model_batch, snapshot
from safetensors.torch import load_file

import pyadapt
from pyadapt import LoraConfig

TARGETS = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False}


@pytest.fixture(autouse=True)
def _quiet():
    """accelerate says of each offloaded model that it is one."""
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


def offloaded(folder):
    """Every weight is aside on the CPU and comes for its layer's forward."""
    model = build("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def dispatched(folder):
    """The second block and the head are on disk, the rest is in memory."""
    return accelerate.dispatch_model(build("llama"), device_map=DEVICE_MAP, main_device="cpu", offload_dir=folder)


def loaded(folder):
    """The same, as transformers loads it."""
    build("llama").save_pretrained(folder / "base")
    cls = type(build("llama"))
    return cls.from_pretrained(folder / "base", device_map=DEVICE_MAP, offload_folder=folder / "offloaded").eval()


DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
FIRST_BLOCK = {**TARGETS, "layers_to_transform": [0]}
PLACES = {
    "offloaded": (offloaded, TARGETS),
    "dispatched": (dispatched, FIRST_BLOCK),
    "loaded": (loaded, FIRST_BLOCK),
}


def logits(model):
    with torch.no_grad():
        return model(**model_batch("llama")).logits


def dense(config, folder):
    """The adapter in `folder` on the model as a whole in memory."""
    return pyadapt.load(build("llama"), folder)


@pytest.mark.parametrize("place", PLACES)
def test_wrapped_saved_and_loaded(place, tmp_path):
    make, config = PLACES[place]
    model = make(tmp_path / "one")
    assert any(parameter.is_meta for parameter in model.parameters())
    pyadapt.wrap(model, LoraConfig(**config)).eval()
    units = [p for name, p in model.named_parameters() if ".adapters." in name]
    assert units
    assert not any(p.is_meta for p in units)
    model.save_pretrained(tmp_path / "adapter")
    plain = pyadapt.load(build("llama"), tmp_path / "adapter")
    assert_near(logits(model), logits(plain), "model")
    ids = model_batch("llama")["input_ids"]
    expected = plain.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    for low in (False, True):
        again = pyadapt.load(make(tmp_path / f"again{low}"), tmp_path / "adapter", low_cpu_mem_usage=low)
        assert not any(p.is_meta for name, p in again.named_parameters() if ".adapters." in name)
        assert_near(logits(again), logits(plain), "model")
        with again.disable_adapter():
            assert_near(logits(again), logits(build("llama")), "model")
        assert_near(logits(pyadapt.unwrap(again)), logits(build("llama")), "model")


@pytest.mark.parametrize("place", ["dispatched", "loaded"])
def test_layers_in_memory_are_trained(place, tmp_path):
    make, config = PLACES[place]
    # Backward goes through the offloaded second block for its inputs' sake, so that only the last layers are trained
    # where the weights behind them are at hand.
    model = pyadapt.wrap(make(tmp_path), LoraConfig(**config))
    hidden = model.model.layers[0](
        torch.randn(1, 3, 24), position_embeddings=model.model.rotary_emb(torch.ones(1), torch.arange(3)[None])
    )
    (hidden[0] if isinstance(hidden, tuple) else hidden).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("place", ["offloaded", "dispatched", "loaded"])
def test_a_trained_head_is_loaded_beside_an_offloaded_one(place, low, tmp_path):
    make, config = PLACES[place]
    plain = pyadapt.wrap(build("llama"), LoraConfig(**config, modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        plain.lm_head.copies["default"].weight.add_(1)
    plain.save_pretrained(tmp_path / "adapter")
    model = pyadapt.load(make(tmp_path / "one"), tmp_path / "adapter", low_cpu_mem_usage=low)
    assert_near(logits(model), logits(plain), "model")
    copied = model.lm_head.copies["default"]
    assert not copied.weight.is_meta
    with model.disable_adapter():
        assert_near(logits(model), logits(build("llama")), "model")
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "adapter"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert_near(logits(pyadapt.unwrap(model)), logits(build("llama")), "model")


@pytest.mark.parametrize("place", ["offloaded", "dispatched"])
def test_an_offloaded_module_cannot_be_trained_whole(place, tmp_path):
    make, config = PLACES[place]
    model = make(tmp_path)
    classes = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(RuntimeError, match=r"modules_to_save: 'lm_head': it is offloaded .* device_map"):
        pyadapt.wrap(model, LoraConfig(**config, modules_to_save=["lm_head"]))
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert_near(logits(model), logits(build("llama")), "model")


@pytest.mark.parametrize("place", ["dispatched", "loaded"])
def test_layers_on_disk_are_refused(place, tmp_path):
    model = PLACES[place][0](tmp_path)
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.q_proj is offloaded to disk; load the model with"):
        pyadapt.wrap(model, LoraConfig(**TARGETS))
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_blocks_that_are_brought_at_once_are_refused():
    model = build("llama")
    weights = model.state_dict()
    attach_align_device_hook(
        model, torch.device("cpu"), offload=True, weights_map=weights, preload_module_classes=["LlamaAttention"]
    )
    with pytest.raises(RuntimeError, match=r"'model\.layers\.0\.self_attn' at once.*without preload_module_classes"):
        pyadapt.wrap(model, LoraConfig(**TARGETS))
    assert not pyadapt.is_wrapped(model)


@pytest.mark.parametrize("make", [offloaded, dispatched])
def test_a_further_hook_on_the_layer_hides_nothing(make, tmp_path):
    model = make(tmp_path)
    for block in model.model.layers:
        add_hook_to_module(block.self_attn.q_proj, ModelHook(), append=True)
    if make is dispatched:
        with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.q_proj is offloaded to disk"):
            pyadapt.wrap(model, LoraConfig(**TARGETS))
        return
    pyadapt.wrap(model, LoraConfig(**TARGETS))
    assert not any(p.is_meta for name, p in model.named_parameters() if ".adapters." in name)


def test_one_device_is_a_model_like_any_other(tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = type(build("llama")).from_pretrained(tmp_path, device_map="cpu").eval()
    before = snapshot(model)
    pyadapt.wrap(model, LoraConfig(**TARGETS))
    model.train()(**model_batch("llama")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    expected = logits(model)
    model.merge_adapter()
    assert_near(logits(model), expected, "merged")
    model.unmerge_adapter()
    assert snapshot(pyadapt.unwrap(model)) == before


def test_weights_can_be_dispatched_after_wrapping(tmp_path):
    model = pyadapt.wrap(build("llama"), LoraConfig(**TARGETS)).eval()
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert_near(logits(model), expected, "model")
