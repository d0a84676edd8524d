"""The benchmarks run and write their rows."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="waits for a source tree: benchmarks are not installed")
def test_quick_run(tmp_path):
    pytest.importorskip("peft", reason="waits for peft: it is one of the cases")
    table = tmp_path / "layer.csv"
    command = [sys.executable, "-m", "benchmarks.layer", "--quick", "--dtype", "fp32", "--csv", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {"pyadapt lora", "pyadapt lora dropout", "pyadapt lora int8", "peft lora"} <= {row["case"] for row in rows}
    assert all(float(row["median_ms"]) > 0 and row["cpu"] and row["isa"] for row in rows)


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="waits for a source tree: benchmarks are not installed")
def test_quick_run_of_the_surroundings(tmp_path):
    pytest.importorskip("peft", reason="waits for peft: it is one of the cases")
    table = tmp_path / "surroundings.csv"
    command = [sys.executable, "-m", "benchmarks.surroundings", "--quick", "--csv", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["measured"] for row in rows} == {"host", "wrap", "import", "load"}
    assert {"pyadapt lora", "peft lora", "pyadapt lora int8"} <= {row["case"] for row in rows}
    assert all(float(row["median"]) > 0 and row["cpu"] and row["unit"] in ("us", "s") for row in rows)


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="waits for a source tree: benchmarks are not installed")
def test_quick_run_of_the_methods(tmp_path):
    for package in ("peft", "lycoris"):
        pytest.importorskip(package, reason=f"waits for {package}: it is one of the libraries")
    table = tmp_path / "methods.csv"
    command = [sys.executable, "-m", "benchmarks.methods", "--quick", "--dtype", "fp32", "--csv", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["library"] for row in rows} == {"pyadapt", "peft", "lycoris"}
    for library, missing in (("pyadapt", set()), ("peft", set()), ("lycoris", {"adalora"})):
        found = {row["case"] for row in rows if row["library"] == library}
        wanted = {"torch frozen", "lora", "adalora", "ia3 output", "ia3 input", "loha", "lokr", "lokr full"}
        assert found == wanted - missing
    assert all(float(row["median_ms"]) > 0 and row["cpu"] and row["isa"] for row in rows)
