"""AdaLoRA's files: peft's both ways at each stage of the schedule, ranks down to none, plain LoRA, hot-swapping."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from adalora_cases import config_of, factors, optimizer_of, randomise, share, train, twin_of, wrapped
from models import ALL, assert_near, build, model_batch, snapshot
from safetensors.torch import load_file
from torch import nn

import pyadapt
from pyadapt import AdaLoraConfig, LoraConfig


def quietly(function, *args, **kwargs):
    """Call peft without what it says of base models that have no config file, and of its own pruned files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        warnings.filterwarnings("ignore", message=r".* LoRA tensor\(s\) have invalid shape")
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors is a no-op")
        return function(*args, **kwargs)


def peft_reads(model, folder):
    return quietly(peft.PeftModel.from_pretrained, model, folder).eval()


def inputs(name="llama"):
    """peft's AdaLoRA cannot be called with labels unless it is trained."""
    batch = model_batch(name)
    if name == "t5":
        return {"decoder_input_ids": batch.pop("labels"), **batch}
    del batch["labels"]
    return batch


def written(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])
    return {key: tuple(value.shape) for key, value in tensors.items()}, config


def at_the_end(name="llama", **config):
    """Our model and peft's twin after the same whole schedule."""
    model, twin = wrapped(name, **config).train(), twin_of(name, **config).train()
    for each, allocate in ((model, model.update_and_allocate), (twin, twin.base_model.update_and_allocate)):
        train(each, optimizer_of(each), range(1, 15), allocate, name)
    return model.eval(), twin.eval()


@pytest.mark.parametrize("name", ALL)
def test_fresh_adapters_go_both_ways(name, tmp_path):
    model, twin = randomise(wrapped(name)), twin_of(name).eval()
    share(model, twin)
    model.save_pretrained(tmp_path / "ours")
    quietly(twin.save_pretrained, tmp_path / "theirs")
    ours, theirs = written(tmp_path / "ours"), written(tmp_path / "theirs")
    assert ours[0] == theirs[0]
    heads = [config.pop("modules_to_save") for _, config in (ours, theirs)]
    assert bool(heads[0]) == bool(heads[1])
    assert ours[1] == theirs[1]
    batch = inputs(name)
    expected = model(**batch).logits
    assert_near(peft_reads(build(name), tmp_path / "ours")(**batch).logits, expected, "model")
    assert_near(pyadapt.load(build(name), tmp_path / "theirs")(**batch).logits, twin(**batch).logits, "model")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pruned_adapters_go_both_ways(name, tmp_path):
    model, twin = at_the_end(name, target_modules="all-linear", target_r=1)
    model.save_pretrained(tmp_path / "ours")
    quietly(twin.save_pretrained, tmp_path / "theirs")
    ours, theirs = written(tmp_path / "ours"), written(tmp_path / "theirs")
    assert ours[0] == theirs[0]
    del ours[1]["target_modules"], theirs[1]["target_modules"]
    assert ours[1] == theirs[1]
    ranks = {sum(kept) for kept in ours[1]["rank_pattern"].values()}
    # A layer without any rank is among them.
    assert 0 in ranks
    assert max(ranks) > 1
    batch = inputs(name)
    expected = model(**batch).logits
    assert_near(peft_reads(build(name), tmp_path / "ours")(**batch).logits, expected, "model")
    loaded = pyadapt.load(build(name), tmp_path / "theirs")
    assert_near(loaded(**batch).logits, expected, "model")
    shapes = {key: tuple(p.shape) for key, p in factors(loaded).items()}
    assert any(0 in shape for shape in shapes.values())
    # Written again it is the same file, and so it is merged.
    loaded.save_pretrained(tmp_path / "again")
    again = written(tmp_path / "again")
    del again[1]["target_modules"]
    assert again == ours
    loaded.merge_adapter()
    assert_near(loaded(**batch).logits, expected, "merged")


def test_alpha_of_0_means_init_r_also_for_pruned_files(tmp_path):
    """peft then takes the ranks that are left, and gives another model than it has trained."""
    model, _ = at_the_end(lora_alpha=0, target_r=1)
    model.save_pretrained(tmp_path)
    batch = inputs()
    assert_near(pyadapt.load(build("llama"), tmp_path)(**batch).logits, model(**batch).logits, "model")
    theirs = peft_reads(build("llama"), tmp_path)
    assert not torch.allclose(theirs(**batch).logits, model(**batch).logits, atol=1e-5)


def test_a_file_from_the_middle_keeps_all_ranks(tmp_path):
    """peft leaves out what was masked last, which its own training might have brought back."""
    model = wrapped().train()
    train(model, optimizer_of(model), range(1, 8), model.update_and_allocate)
    model.save_pretrained(tmp_path)
    shapes, config = written(tmp_path)
    assert config["rank_pattern"] is None
    assert {shape[0] for key, shape in shapes.items() if "lora_A" in key} == {4}
    batch = inputs()
    theirs = peft_reads(build("llama"), tmp_path)
    assert_near(theirs(**batch).logits, model.eval()(**batch).logits, "model")


def test_a_pruned_file_can_be_trained(tmp_path):
    """Its ranks were allocated: nothing more is taken away."""
    model, _ = at_the_end(target_r=1)
    model.save_pretrained(tmp_path)
    again = pyadapt.load(build("llama"), tmp_path, is_trainable=True).train()
    ranks = [unit.lora_E.shape[0] for unit in again.units_of("default")]
    losses, zeros = train(again, optimizer_of(again), [1, 2, 10, 14, 15, 16], again.update_and_allocate)
    assert losses[0] != losses[-1]
    assert not any(map(any, zeros[-1].values()))
    again.save_pretrained(tmp_path / "again")
    loaded = pyadapt.load(build("llama"), tmp_path / "again")
    assert [unit.lora_E.shape[0] for unit in loaded.units_of("default")] == ranks
    assert_near(loaded(**inputs()).logits, again.eval()(**inputs()).logits, "model")


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_no_rank_at_all(low_cpu_mem_usage, tmp_path):
    """Every layer of the file is empty: the base model, in training and in a mixed batch too."""
    model = randomise(wrapped())
    for unit in model.units_of("default"):
        unit.kept.fill_(False)
        unit.settled.fill_(True)
    model.save_pretrained(tmp_path)
    shapes, _ = written(tmp_path)
    assert set(shapes.values()) == {(0, 24), (24, 0), (0, 1), (12, 0)}
    batch = inputs()
    loaded = pyadapt.load(build("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    expected = build("llama")(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)
    loaded.add_adapter("lora", LoraConfig(init_lora_weights=False))
    mixed = loaded(**batch, adapter_names=["default", "lora"]).logits
    assert_near(mixed[0], expected[0], "model")
    assert not torch.allclose(mixed[1], expected[1])
    loaded.merge_adapter()
    assert_near(loaded(**batch).logits, expected, "merged")


def test_a_tensor_that_was_not_gathered_is_still_refused(tmp_path):
    model = wrapped()
    unit = model.units_of("default")[0]
    unit.lora_A = nn.Parameter(torch.empty(0))
    with pytest.raises(pyadapt.AdapterFileError, match=r"lora_A is of shape \(0,\) on rank 0, and not whole"):
        model.save_pretrained(tmp_path)
    unit.lora_A = nn.Parameter(torch.empty(0, 24))
    with pytest.raises(pyadapt.AdapterFileError, match=r"lora_A is of shape \(0, 24\) on rank 0, and not whole"):
        model.save_pretrained(tmp_path)


def test_files_that_do_not_fit_their_pattern(tmp_path):
    model, _ = at_the_end()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    first = next(iter(config["rank_pattern"]))
    config["rank_pattern"][first] = [True, True, True, True]
    other = dict(config, rank_pattern={"nowhere.lora_E": [True] * 4})
    fresh = build("llama")
    before = snapshot(fresh)
    for values, message in ((config, "misshapen"), (other, "names none of the 4 adapted layers")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        with pytest.raises(pyadapt.AdapterFileError, match=message):
            pyadapt.load(fresh, tmp_path)
    assert snapshot(fresh) == before


# --- plain LoRA --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fresh", "pruned"])
@pytest.mark.parametrize("library", ["ours", "theirs"])
def test_as_plain_lora(stage, library, tmp_path):
    model = at_the_end(target_modules="all-linear", target_r=1)[0] if stage == "pruned" else randomise(wrapped())
    model.save_pretrained(tmp_path, as_plain_lora=True)
    assert not (tmp_path / "adapter_training_state.safetensors").exists()
    shapes, config = written(tmp_path)
    assert config["peft_type"] == "LORA"
    # A layer without any rank has one of zeros.
    assert {shape[0] for key, shape in shapes.items() if "lora_A" in key} == (
        {1, 2, 3, 4} if stage == "pruned" else {4}
    )
    batch = inputs()
    if library == "ours":
        loaded = pyadapt.load(build("llama"), tmp_path)
    else:
        loaded = peft_reads(build("llama"), tmp_path)
    assert_near(loaded(**batch).logits, model(**batch).logits, "model")


def test_convolutions_as_plain_lora_and_in_files(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    settings = {"target_modules": ["0"], "init_r": 3, "target_r": 2, "total_step": 9}
    model = randomise(pyadapt.wrap(plain, AdaLoraConfig(**settings)))
    x = torch.randn(2, 4, 9, 7)
    expected = model(x)
    model.save_pretrained(tmp_path / "adalora")
    model.save_pretrained(tmp_path / "lora", as_plain_lora=True)
    for folder in ("adalora", "lora"):
        torch.manual_seed(0)
        fresh = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
        assert_near(peft_reads(fresh, tmp_path / folder)(x), expected, "layer")
        torch.manual_seed(0)
        fresh = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
        assert_near(pyadapt.load(fresh, tmp_path / folder)(x), expected, "layer")


# --- hot-swapping ------------------------------------------------------------------------------


def test_hotswap(tmp_path):
    other, _ = at_the_end(target_r=1, lora_alpha=20)
    other.save_pretrained(tmp_path / "pruned")
    randomise(wrapped(init_r=6)).save_pretrained(tmp_path / "higher")
    model = randomise(wrapped(), seed=8)
    model.save_pretrained(tmp_path / "own")
    model = pyadapt.load(build("llama"), tmp_path / "own")
    held = {key: id(p) for key, p in factors(model).items()}
    batch = inputs()
    assert model.hotswap_adapter(tmp_path / "pruned")
    assert_near(model(**batch).logits, other(**batch).logits, "model")
    assert {key: id(p) for key, p in factors(model).items()} == held
    assert not model.hotswap_adapter(tmp_path / "higher")
    model = pyadapt.load(build("llama"), tmp_path / "own")
    before = model(**batch).logits
    model.pad_ranks(6)
    assert_near(model(**batch).logits, before, "model")
    assert model.hotswap_adapter(tmp_path / "higher")
    expected = pyadapt.load(build("llama"), tmp_path / "higher")(**batch).logits
    assert_near(model(**batch).logits, expected, "model")


def test_an_adapter_in_training_cannot_be_padded():
    model = wrapped()
    before = snapshot(model)
    with pytest.raises(ValueError, match="in training are its budget and cannot be padded"):
        model.pad_ranks(6)
    assert snapshot(model) == before


def test_swapping_in_training_starts_the_schedule_anew(tmp_path):
    randomise(wrapped()).save_pretrained(tmp_path)
    model = wrapped().train()
    train(model, optimizer_of(model), range(1, 15), model.update_and_allocate)
    assert model.hotswap_adapter(tmp_path)
    assert all(bool(unit.kept.all()) and not bool(unit.settled) for unit in model.units_of("default"))
    model.save_pretrained(tmp_path / "again")
    assert written(tmp_path / "again")[1]["rank_pattern"] is None


def test_configurations_of_both_are_the_same(tmp_path):
    model, _ = at_the_end()
    model.save_pretrained(tmp_path)
    ours = pyadapt.AdapterConfig.from_pretrained(tmp_path)
    theirs = pyadapt.AdapterConfig.from_peft(peft.PeftConfig.from_pretrained(tmp_path))
    assert ours == theirs
    assert set(ours.rank_pattern) == {f"{path}.lora_E" for path, _ in layers(model)}
    assert config_of()["init_r"] == ours.init_r


def layers(model):
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "adapters")]
