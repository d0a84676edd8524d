"""Whole runs: MiniLM from its package by the command, and tiny local models on the user's own data."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyadapt.quickstart import Options, QuickstartError, run
from pyadapt.quickstart.pretrained import minilm_folder
from pyadapt.quickstart.story import quickstart

SMALL = ["--limit", "48", "--epochs", "2", "--max-length", "24", "--batch-size", "12", "--device", "cpu"]
PRODUCTS = {"adapter", "merged", "summary.json", "training.png"}


@pytest.mark.slow
def test_the_command_from_beginning_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "pyadapt", "quickstart", *SMALL, "--out", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == PRODUCTS
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (out / "adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    for row in ("accuracy before", "accuracy after", "trainable share", "frozen model", "plain torch", "peak memory"):
        assert row in done.stdout
    assert "loss" in done.stderr
    assert "tokens/s" in done.stderr
    figures = json.loads((out / "summary.json").read_text())
    assert figures["labels_that_agree"] == figures["heldout_texts"] == 48
    assert figures["largest_logit_difference"] < 1e-3
    assert 0 < figures["trainable_parameters"] < 0.1 * figures["all_parameters"]
    assert figures["adapter_bytes"] < 0.1 * figures["merged_bytes"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts whose label is a word that they hold."""
    words = ["river", "engine", "violin"]
    rows = [{"text": f"a {words[i % 3]} of number {i}", "label": words[i % 3]} for i in range(60)]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return file


def tiny_model(kind: str, folder: Path) -> Path:
    """A random model of two small layers, saved with MiniLM's tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "base"), [("bert", "fp16"), ("llama", "bf16")])
def test_a_local_model_on_own_data(
    tmp_path: Path, data: Path, kind: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyadapt.quickstart.story.TIMED_ROUNDS", 1)
    out = tmp_path / "out"
    model = tiny_model(kind, tmp_path / kind)
    options = Options(
        model=str(model), data=data, base=base, epochs=6, batch_size=8, lr=1e-2, rank=4, device="cpu", out=out
    )
    figures = quickstart(options)
    assert {path.name for path in out.iterdir()} == PRODUCTS
    assert figures.labels == 3
    assert figures.heldout_texts == 12
    assert figures.accuracy_after > figures.accuracy_before
    assert figures.labels_that_agree >= 11


def test_a_length_beyond_the_model_is_refused_and_nothing_written(tmp_path: Path, data: Path) -> None:
    options = Options(data=data, max_length=100_000, device="cpu", out=tmp_path / "out")
    with pytest.raises(QuickstartError, match="--max-length is 100000, this model takes at most 512 tokens"):
        quickstart(options)
    assert not options.out.exists()


def test_a_failing_run_leaves_no_output(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def diverge(*arguments: Any) -> None:
        raise QuickstartError("the loss is nan at step 1: lower --lr")

    monkeypatch.setattr("pyadapt.quickstart.training.train", diverge)
    options = Options(model=str(tiny_model("bert", tmp_path / "bert")), data=data, device="cpu", out=tmp_path / "out")
    assert run(options) == 2
    assert capsys.readouterr().err.endswith("error: the loss is nan at step 1: lower --lr\n")
    assert not options.out.exists()
