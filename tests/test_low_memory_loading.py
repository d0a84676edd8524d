"""low_cpu_mem_usage: the tensors of the file are the adapter's weights; nothing is drawn, nothing held twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from models import FAMILIES, build, model_batch, plain_module, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import pyadapt
from pyadapt import AdapterFileError, LoraConfig, attach

OPTIONS = {
    "lora": {},
    "dora": {"use_dora": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "all", "lora_bias": False},
    "pissa": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.fixture
def saved(tmp_path):
    """A function of the options of a config: the folder of a trained adapter for the tiny Llama, and its logits."""

    def make(**options):
        config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
        model = pyadapt.wrap(build("llama"), LoraConfig(**config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        return tmp_path, logits(model.eval())

    return make


def logits(model):
    with torch.no_grad():
        return model(**model_batch("llama")).logits


def adapter(model, name="default"):
    return model.get_adapter_state_dict(name)


def none_on_meta(model):
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_model_is_the_same(options, saved):
    folder, expected = saved(**options)
    model, usual = build("llama"), pyadapt.load(build("llama"), folder)
    before = snapshot(model)
    pyadapt.load(model, folder, low_cpu_mem_usage=True)
    assert none_on_meta(model)
    assert torch.equal(logits(model), expected)
    assert adapter(model).keys() == adapter(usual).keys()
    for key, value in adapter(usual).items():
        ours = adapter(model)[key]
        assert torch.equal(ours, value)
        assert (ours.dtype, ours.requires_grad) == (value.dtype, value.requires_grad)
    assert not model.training
    assert snapshot(pyadapt.unwrap(model)) == before


def test_further_adapters_and_training(saved):
    folder, _ = saved(modules_to_save=["lm_head"])
    model = pyadapt.wrap(build("llama"), LoraConfig())
    model.load_adapter(folder, "second", is_trainable=True, low_cpu_mem_usage=True)
    again = pyadapt.PeftModel.from_pretrained(model, folder, "third", low_cpu_mem_usage=True)
    assert again is model
    model.set_adapter("second")
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} <= {"second"}
    model.train()(**model_batch("llama")).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    before = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for parameter in trained:
            parameter.zero_()
    # The file is not written through, and the other adapter of the same file is another.
    after = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(bool(value.abs().sum() > 0) for key, value in adapter(model, "third").items() if "lora" in key)


def test_nothing_is_drawn(saved, monkeypatch):
    folder, expected = saved()
    model, other = build("llama"), build("llama")

    def drawn(*args, **kwargs):
        raise AssertionError("first values were drawn")

    for name in ("kaiming_uniform_", "normal_", "zeros_"):
        monkeypatch.setattr(nn.init, name, drawn)
    state = torch.get_rng_state()
    pyadapt.load(model, folder, low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), expected)
    with pytest.raises(AssertionError, match="drawn"):
        pyadapt.load(other, folder)


def test_a_start_that_depends_on_the_weight_is_run(saved):
    folder, _ = saved(init_lora_weights="pissa")
    model = pyadapt.load(build("llama"), folder, low_cpu_mem_usage=True)
    assert model.model.layers[0].self_attn.q_proj.adapters["default"].start_A is not None


def test_the_dtype_is_that_of_the_configuration(saved):
    folder, _ = saved()
    file = folder / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    model = pyadapt.load(build("llama"), folder, low_cpu_mem_usage=True)
    assert {value.dtype for value in adapter(model).values()} == {torch.float32}
    held = pyadapt.load(build("llama"), folder, low_cpu_mem_usage=True, adapter_dtype="bfloat16")
    assert {value.dtype for value in adapter(held).values()} == {torch.bfloat16}


def without(folder, *keys):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in keys:
        del tensors[key]
    save_file(tensors, file)


def test_what_is_missing_is_listed_or_starts_as_usual(saved):
    folder, _ = saved(modules_to_save=["lm_head"])
    missing = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    without(folder, missing, "base_model.model.lm_head.weight")
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match=f"missing: +{missing}"):
        pyadapt.load(model, folder, low_cpu_mem_usage=True)
    assert snapshot(model) == before
    pyadapt.load(model, folder, low_cpu_mem_usage=True, strict=False)
    assert none_on_meta(model)
    unit = model.model.layers[1].self_attn.q_proj.adapters["default"]
    assert bool((unit.lora_B == 0).all())
    assert torch.equal(model.lm_head.copies["default"].weight, model.lm_head.weight)
    file = load_file(folder / "adapter_model.safetensors")
    assert torch.equal(unit.lora_A, file["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"])


def test_by_the_name_of_its_base(saved, monkeypatch):
    folder, expected = saved()
    base = folder / "base"
    build("llama").save_pretrained(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    asked = []
    make = attach.attach
    monkeypatch.setattr(attach, "attach", lambda *args: asked.append(args[-1]) or make(*args))
    model = pyadapt.AutoPeftModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)
    assert asked[0]
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "vit"])
def test_every_family(name, tmp_path):
    config = LoraConfig(task_type=FAMILIES[name].task, init_lora_weights=False, r=4)
    model = pyadapt.wrap(build(name), config).eval()
    model.save_pretrained(tmp_path)
    again = pyadapt.load(build(name), tmp_path, low_cpu_mem_usage=True)
    batch = model_batch(name)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_plain_and_int8_modules(tmp_path):
    for make in (plain_module, lambda: pyadapt.quantize(plain_module())):
        model = pyadapt.wrap(make(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
        model.save_pretrained(tmp_path)
        again = pyadapt.load(make(), tmp_path, low_cpu_mem_usage=True)
        x = torch.randn(3, 7)
        assert torch.equal(again(x), model(x))


# --- models without values --------------------------------------------------------------------


def on_meta():
    with torch.device("meta"):
        return build("llama")


def test_a_model_without_values_is_planned_and_wrapped():
    model, real = on_meta(), build("llama")
    config = LoraConfig(modules_to_save=["lm_head"])
    ours, theirs = (pyadapt.plan(m, config).as_dict() for m in (model, real))
    for row in (*ours["layers"], *theirs["layers"]):
        del row["kernel"]
    assert ours == theirs
    pyadapt.wrap(model, config)
    pyadapt.wrap(real, config)
    assert all(parameter.is_meta for parameter in model.parameters())
    # Values come later, base and adapter alike.
    model.load_state_dict(real.state_dict(), assign=True)
    model.model.rotary_emb = real.model.rotary_emb
    assert torch.equal(logits(model), logits(real))


def test_a_file_needs_values_or_keeps_its_own(saved):
    folder, expected = saved()
    model = on_meta()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(AdapterFileError, match=r"q_proj\.lora_A\.weight.*low_cpu_mem_usage=True"):
        pyadapt.load(model, folder)
    assert not pyadapt.is_wrapped(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    pyadapt.wrap(model, LoraConfig(), "fresh")
    with pytest.raises(AdapterFileError, match="low_cpu_mem_usage=True"):
        model.load_adapter(folder)
    assert list(model.peft_config) == ["fresh"]
    pyadapt.load(model, folder, low_cpu_mem_usage=True)
    model.delete_adapter("fresh")
    assert not any(value.is_meta for value in adapter(model).values())
    real = build("llama")
    model.load_state_dict(real.state_dict(), assign=True, strict=False)
    model.model.rotary_emb = real.model.rotary_emb
    assert torch.equal(logits(model), expected)


# --- memory -----------------------------------------------------------------------------------

# The adapter is 64 MB, its base next to nothing; the peak is that of a process of its own.
PEAK = """
import json, sys
import torch, pyadapt

def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) // 1024

torch.set_num_threads(1)
low, folder = sys.argv[1] == "low", sys.argv[2]
pyadapt.load(torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)), folder + "/small")
model = torch.nn.Sequential(torch.nn.Linear(4096, 8, bias=False))
before = status("VmRSS")
# Begins the peak anew.
open("/proc/self/clear_refs", "w").write("5")
pyadapt.load(model, folder + "/large", low_cpu_mem_usage=low)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of a process as Linux keeps it")
def test_peak_memory_is_that_of_the_file(tmp_path):
    for name, size in (("small", 8), ("large", 4096)):
        model = nn.Sequential(nn.Linear(size, 8, bias=False))
        pyadapt.wrap(model, LoraConfig(r=size, target_modules=["0"]))
        model.save_pretrained(tmp_path / name)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    grown = {}
    for how in ("low", "usual"):
        command = [sys.executable, "-c", PEAK, how, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        grown[how] = json.loads(done.stdout)
    # 64 MB in the file; as usual they are there twice.
    assert grown["low"] < 80
    assert grown["usual"] > 110
