"""Exported models: plain checkpoints that need no pyadapt, from a model that stays as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from models import ALL, FAMILIES, assert_near, build, model_batch, plain_module, snapshot
from safetensors.torch import load_file

import pyadapt
from pyadapt import LoraConfig

# Run in a process of its own, where importing pyadapt fails: loads every folder and writes down its logits.
READER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pyadapt":
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import pyadapt
except ImportError:
    pass
else:
    raise SystemExit("pyadapt could be imported")

import json, torch, transformers

for folder in sys.argv[1:]:
    config = json.load(open(folder + "/config.json"))
    assert "quantization_config" not in config, folder
    cls = getattr(transformers, config["architectures"][0])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    with torch.no_grad():
        logits = model.eval()(**torch.load(folder + "/batch.pt")).logits
    torch.save(logits, folder + "/logits.pt")
"""


def wrapped(name, quantised=False, dtype=torch.float32, **config):
    model = build(name, dtype=dtype)
    if quantised:
        pyadapt.quantize(model)
    return pyadapt.wrap(model, LoraConfig(task_type=FAMILIES[name].task, init_lora_weights=False, r=4, **config))


def run_reader(folders):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READER, *map(os.fspath, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_every_family_is_read_where_pyadapt_cannot_be_imported(tmp_path):
    """One process for all, since importing transformers is what takes the time."""
    expected = {}
    for name in ALL:
        for kind in ("dense", "int8"):
            model = wrapped(name, quantised=kind == "int8")
            batch = model_batch(name)
            folder = tmp_path / f"{name}-{kind}"
            before = snapshot(model)
            expected[folder] = model(**batch).logits
            report = pyadapt.export(model, folder)
            assert snapshot(model) == before
            assert torch.equal(model(**batch).logits, expected[folder])
            count = FAMILIES[name].target_count
            assert len(report.sources) == (count if kind == "dense" else FAMILIES[name].all_linear_count)
            torch.save(batch, folder / "batch.pt")
    run_reader(expected)
    for folder, logits in expected.items():
        assert_near(torch.load(folder / "logits.pt"), logits, "merged")


def test_the_model_trains_on_after_an_export(tmp_path):
    model = wrapped("llama", quantised=True)
    pyadapt.export(model, tmp_path)
    assert pyadapt.is_wrapped(model)
    assert model.config.quantization_config.quant_method == "pyadapt_int8"
    model.train()(**model_batch("llama")).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.adapters["default"].lora_A.grad is not None


def test_dtype_is_kept(tmp_path):
    pyadapt.export(wrapped("llama", dtype=torch.bfloat16), tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_keys_are_those_of_the_plain_model(tmp_path):
    build("bert").save_pretrained(tmp_path / "plain")
    pyadapt.export(wrapped("bert"), tmp_path / "merged")
    assert sorted(os.listdir(tmp_path / "merged")) == sorted(os.listdir(tmp_path / "plain"))
    plain, merged = (load_file(tmp_path / which / "model.safetensors") for which in ("plain", "merged"))
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in merged.items()}
    same = {key for key in plain if torch.equal(plain[key], merged[key])}
    changed = {key for key in plain if key.endswith(("query.weight", "value.weight"))}
    assert plain.keys() - same == changed


def test_trained_modules_are_in_the_file(tmp_path):
    model = wrapped("bert")
    with torch.no_grad():
        model.classifier.copies["default"].weight.add_(1)
    pyadapt.export(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["classifier.weight"], model.classifier.copies["default"].weight)
    again = type(build("bert")).from_pretrained(tmp_path).eval()
    batch = model_batch("bert")
    assert_near(again(**batch).logits, model(**batch).logits, "merged")


def test_a_trained_head_that_is_tied_is_not_lost(tmp_path):
    model = wrapped("gpt2", target_modules=["c_attn"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.copies["default"].weight.add_(torch.randn(67, 24))
    batch = model_batch("gpt2")
    expected = model(**batch).logits
    pyadapt.export(model, tmp_path)
    again = type(build("gpt2")).from_pretrained(tmp_path).eval()
    assert_near(again(**batch).logits, expected, "merged")


def test_a_quantised_model_without_adapters(tmp_path):
    model = pyadapt.quantize(build("llama"))
    batch = model_batch("llama")
    report = pyadapt.export(model, tmp_path)
    assert set(report.sources.values()) == {"dequantised int8 weights"}
    again = type(build("llama")).from_pretrained(tmp_path).eval()
    assert_near(again(**batch).logits, model(**batch).logits, "merged")


def test_from_the_original_weights(tmp_path):
    build("llama").save_pretrained(tmp_path / "original")
    model = wrapped("llama", quantised=True)
    report = pyadapt.export(model, tmp_path / "merged", original=tmp_path / "original")
    assert set(report.sources.values()) == {"original weights"}
    original, merged = (load_file(tmp_path / w / "model.safetensors") for w in ("original", "merged"))
    # Layers without an adapter come back bit for bit.
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(original[key], merged[key])
    unit = model.model.layers[0].self_attn.q_proj.adapters["default"]
    key = "model.layers.0.self_attn.q_proj.weight"
    assert_near(merged[key], original[key] + unit.scaling * unit.lora_B @ unit.lora_A, "merged")


def test_original_weights_in_shards(tmp_path):
    build("llama").save_pretrained(tmp_path / "original", max_shard_size="8KB")
    assert len(list((tmp_path / "original").glob("model-*.safetensors"))) > 2
    model = wrapped("llama", quantised=True)
    report = pyadapt.export(model, tmp_path / "merged", original=tmp_path / "original")
    assert set(report.sources.values()) == {"original weights"}


def test_in_shards(tmp_path):
    model = wrapped("llama")
    pyadapt.export(model, tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    batch = model_batch("llama")
    again = type(build("llama")).from_pretrained(tmp_path).eval()
    assert_near(again(**batch).logits, model(**batch).logits, "merged")


def test_plain_module(tmp_path):
    model = plain_module()
    keys = set(model.state_dict())
    pyadapt.wrap(
        model, LoraConfig(target_modules=["encoder.0"], modules_to_save=["classifier"], init_lora_weights=False)
    )
    with torch.no_grad():
        model.classifier.copies["default"].bias.add_(1)
    x = torch.randn(4, 7)
    pyadapt.export(model, tmp_path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == keys
    plain = plain_module(seed=9)
    plain.load_state_dict(tensors)
    assert_near(plain(x), model(x), "merged")


def test_the_active_adapters_are_folded_in(tmp_path):
    model = wrapped("llama")
    model.add_adapter("second", LoraConfig(init_lora_weights=False))
    batch = model_batch("llama")
    for names in (["second"], ["default", "second"]):
        model.set_adapter(names)
        pyadapt.export(model, tmp_path / "-".join(names))
        again = type(build("llama")).from_pretrained(tmp_path / "-".join(names)).eval()
        assert_near(again(**batch).logits, model(**batch).logits, "merged")


def test_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    model = wrapped("llama")
    with pytest.raises(ValueError, match="is a file; a folder is needed"):
        pyadapt.export(model, tmp_path / "file")
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        pyadapt.export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == ["file"]


def test_over_an_older_export(tmp_path):
    model = wrapped("llama")
    pyadapt.export(model, tmp_path)
    first = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.adapters["default"].lora_B.add_(1)
    pyadapt.export(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != first
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_generation_settings_go_along(tmp_path):
    model = wrapped("llama")
    model.generation_config.max_new_tokens = 3
    pyadapt.export(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 3
