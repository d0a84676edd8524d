"""The benchmarks run and write their rows."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="waits for a source tree: benchmarks are not installed"
)


def rows_of(benchmark, folder, *options):
    """The rows that a quick run of `benchmarks.<benchmark>` writes."""
    table = folder / f"{benchmark}.csv"
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--quick", *options, "--csv", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(table.read_text().splitlines()))


def test_quick_run(tmp_path):
    pytest.importorskip("peft", reason="waits for peft: it is one of the cases")
    rows = rows_of("layer", tmp_path, "--dtype", "fp32")
    assert {"pyadapt lora", "pyadapt lora dropout", "pyadapt lora int8", "peft lora"} <= {row["case"] for row in rows}
    assert all(float(row["median_ms"]) > 0 and row["cpu"] and row["isa"] for row in rows)


def test_quick_run_of_the_surroundings(tmp_path):
    pytest.importorskip("peft", reason="waits for peft: it is one of the cases")
    rows = rows_of("surroundings", tmp_path)
    assert {row["measured"] for row in rows} == {"host", "wrap", "import", "load"}
    assert {"pyadapt lora", "peft lora", "pyadapt lora int8"} <= {row["case"] for row in rows}
    assert all(float(row["median"]) > 0 and row["cpu"] and row["unit"] in ("us", "s") for row in rows)


def test_quick_run_of_the_methods(tmp_path):
    for package in ("peft", "lycoris"):
        pytest.importorskip(package, reason=f"waits for {package}: it is one of the libraries")
    rows = rows_of("methods", tmp_path, "--dtype", "fp32")
    assert {row["library"] for row in rows} == {"pyadapt", "peft", "lycoris"}
    for library, missing in (("pyadapt", set()), ("peft", set()), ("lycoris", {"adalora"})):
        found = {row["case"] for row in rows if row["library"] == library}
        wanted = {"torch frozen", "lora", "adalora", "ia3 output", "ia3 input", "loha", "lokr", "lokr full"}
        assert found == wanted - missing
    assert all(float(row["median_ms"]) > 0 and row["cpu"] and row["isa"] for row in rows)


def test_quick_run_of_the_prompts(tmp_path):
    pytest.importorskip("peft", reason="waits for peft: it is one of the libraries")
    rows = rows_of("prompts", tmp_path, "--dtype", "fp32")
    wanted = {"frozen", "prefix", "prefix mlp", "prompt", "p-tuning", "llama-adapter"}
    for kind in ("training", "decoding"):
        for library in ("pyadapt", "peft"):
            assert {row["case"] for row in rows if (row["kind"], row["library"]) == (kind, library)} == wanted
    assert all(float(row["median_ms"]) > 0 and row["cpu"] and row["isa"] for row in rows)
