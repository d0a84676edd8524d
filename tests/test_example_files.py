"""Every file in examples/ runs with --tiny, offline, and its metric improves clearly."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

FOLDER = Path(__file__).parents[1] / "examples"
# What examples share; a new example is run without an edit here.
SHARED = ["common.py", "memory.py"]
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in SHARED)
LONGEST = 150
LONGEST_SHARED = 80
# What an example prints once for each adapter that it trained.
METRIC = re.compile(r"^.+: (?P<before>[\d.]+) before training, (?P<after>[\d.]+) after$", re.MULTILINE)
CLEARLY = 0.2
# Nobody answers there: what passes by the hub's own switch fails as well.
OFFLINE = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def run(*command, **environment):
    """The finished process of Python with these arguments, offline, on one core."""
    known = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    # A tree that was not installed is found as well.
    known["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=known, timeout=600, check=False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_learns_offline(name, tmp_path, capsys):
    result = run(FOLDER / name, "--tiny", "--output", tmp_path / "out")
    print(result.stdout, result.stderr, sep="\n")  # shown where the test fails
    assert result.returncode == 0
    with capsys.disabled():  # shown where it passes, too
        for line in dict.fromkeys(line for line in result.stderr.splitlines() if "Warning: " in line):
            print(f"\n{name} warns: {line}")
    metrics = list(METRIC.finditer(result.stdout))
    assert metrics, "it printed no line '<metric>: <before> before training, <after> after'"
    for found in metrics:
        assert float(found["after"]) >= float(found["before"]) + CLEARLY, found[0]
    assert len(re.findall(r"^trainable params: \d+ ", result.stdout, re.MULTILINE)) == len(metrics)
    assert len(list((tmp_path / "out").rglob("adapter_model.safetensors"))) == len(metrics)


@pytest.mark.parametrize("name", [*EXAMPLES, *SHARED])
def test_it_is_short(name):
    lines = (FOLDER / name).read_text(encoding="utf-8").count("\n")
    assert lines <= (LONGEST_SHARED if name in SHARED else LONGEST)


@pytest.fixture
def common():
    """What the examples share, as a module."""
    source = importlib.util.spec_from_file_location("examples_common", FOLDER / "common.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


def test_without_datasets_it_says_what_is_missing(common, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match=r"need the package datasets: pip install datasets \(or use --tiny\)"):
        common.hub_rows("somebody/rows")


REAL = {"model": "somebody/model", "dataset": "somebody/rows", "epochs": 5, "batch_size": 8, "lr": 1e-3}


def test_options(common, monkeypatch):
    """What is given counts; then what suits --tiny; then what suits the real model."""
    monkeypatch.setattr(sys, "argv", ["examples/one.py", "--tiny", "--lr", "0.5"])
    args = common.arguments("One.", REAL, {"epochs": 2, "lr": 0.1})
    assert (args.epochs, args.batch_size, args.lr) == (2, 8, 0.5)
    assert args.output == Path("one-out")
    assert args.model == Path("one-out/base")
    monkeypatch.setattr(sys, "argv", ["examples/one.py", "--model", "another"])
    args = common.arguments("One.", REAL, {"epochs": 2, "lr": 0.1})
    assert (args.model, args.dataset, args.epochs, args.lr) == ("another", "somebody/rows", 5, 1e-3)


def test_tiny_takes_no_real_model(common, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["examples/one.py", "--tiny", "--model", "another"])
    with pytest.raises(SystemExit):
        common.arguments("One.", REAL, {})
    assert "leave out --model and --dataset" in capsys.readouterr().err
