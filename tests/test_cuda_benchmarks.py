"""The arithmetic and the tables of the CUDA benchmarks, without a GPU; and every call that they time, emulated."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from source_tree import ROOT, benchmark

from pyadapt import native

if not (ROOT / "benchmarks").is_dir():
    pytest.skip("waits for a source tree: benchmarks are not installed", allow_module_level=True)

kernels, layers, timing = (benchmark(f"cuda.{name}") for name in ("kernels", "layers", "timing"))
measure = benchmark("measure")

CEILINGS = timing.Ceilings(bandwidth=4e12, arithmetic=8e14)
HOPPER, AMPERE = (9, 0), (8, 6)


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.now = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def test_interleaving_and_failures():
    clock, order = Clock(), []

    def prepare(run, copies):
        run(copies - 1)

        def replay():
            order.append(run(0))
            clock.now += 1.0
            return float(len(order))

        return replay

    def fails(_):
        raise RuntimeError("out of luck\nand more")

    cases = {"a": lambda i: f"a{i}", "broken": fails, "b": lambda i: f"b{i}"}
    found, failed = timing.interleave(cases, 4, 11.0, prepare, clock)
    assert order == ["a0", "b0"] * 6  # two seconds a round
    assert found["a"].times == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
    assert failed == {"broken": "RuntimeError: out of luck"}


def test_deadline_notes_what_it_leaves_out():
    clock = Clock()
    deadline = timing.Deadline(10.0, clock)
    assert deadline.allows("first", 9.0)
    clock.now = 4.0
    assert not deadline.allows("second", 7.0)
    assert deadline.allows("third", 5.0)
    assert deadline.left_out == ["second"]
    assert "left out for time: 1 (second)" in deadline.report()


def test_copies():
    megabyte = 1 << 20
    assert timing.copies_of(32 * megabyte, 64 * megabyte, 60 * megabyte, 140 << 30) == 8
    assert timing.copies_of(1024 * megabyte, megabyte, 60 * megabyte, 140 << 30) == 2
    assert timing.copies_of(1, megabyte, 60 * megabyte, 140 << 30) == timing.MOST_COPIES
    assert timing.copies_of(1, 1024 * megabyte, 60 * megabyte, 16 << 30) == 3


def test_floors():
    """At 4 TB/s and 800 TFLOP/s a product of 4096 x 4096 with 8192 rows is arithmetic, with one row memory."""
    large, one = (2.0 * M * 4096 * 4096 for M in (8192, 1))
    assert CEILINGS.floor_ms(large, 4096 * 4096 * 2) == pytest.approx(1e3 * large / 8e14)
    assert CEILINGS.floor_ms(one, 4096 * 4096 * 2) == pytest.approx(1e3 * 4096 * 4096 * 2 / 4e12)


def test_counts():
    point = kernels.Point(2048, 4096, 1024, 16, "int8", 0.0)
    work = kernels.work_of("1 linear_forward", point, HOPPER)
    assert work.operations == 2 * 2048 * 4096 * 1024
    assert work.moved == 2 * 2048 * 4096 + (4096 * 1024 + 4 * 1024) + 2 * 2048 * 1024
    assert work.target == 1.15
    assert kernels.work_of("1 linear_forward", point, AMPERE).target == 1.25
    assert kernels.work_of("3 shrink", point, HOPPER).moved == 2 * 2048 * 4096 + 4 * 16 * (4096 + 2048)
    # The g pass over int8 also writes the scaled g.
    plain = kernels.Point(2048, 4096, 1024, 16, "16", 0.0)
    written = [kernels.work_of("4 gradients, g pass", p, HOPPER).moved for p in (point, plain)]
    assert written[0] - written[1] == 2 * 2048 * 1024


def test_rows_of_kernels(tmp_path):
    point = kernels.Point(8192, 4096, 4096, 16, "16", 0.0)
    found = {"product": 1.0, "1+3 lora_forward": 1.2, "3 shrink": 0.1, "7 library forward": 1.09}
    rows = kernels.rows_of(point, {name: measure.Timing([ms]) for name, ms in found.items()}, CEILINGS, HOPPER)
    by_name = {row["kernel"]: row for row in rows}
    assert set(by_name) == {"1 lora_forward - shrink", "1+3 lora_forward", "3 shrink", "7 library forward"}
    difference = by_name["1 lora_forward - shrink"]
    assert difference["over_floor"] == pytest.approx(1.1)
    assert (difference["verdict"], difference["p20_ms"]) == ("ok", "")
    assert (by_name["7 library forward"]["verdict"], by_name["7 library forward"]["target"]) == ("miss", 1.08)
    assert by_name["1+3 lora_forward"]["verdict"] == ""
    shrink = by_name["3 shrink"]
    assert shrink["floor_ms"] == pytest.approx(1e3 * (2 * 8192 * 4096 + 4 * 16 * (4096 + 8192)) / 4e12, abs=1e-5)
    assert (shrink["verdict"], shrink["of_bandwidth"]) == ("miss", pytest.approx(0.17, abs=0.01))
    assert all(name in kernels.table(rows) for name in by_name)
    lines = kernels.headline(rows)
    assert any(line.startswith("miss 7 library forward") and "0/1 within 1.08" in line for line in lines)
    assert any(line.startswith("ok   1 lora_forward - shrink") for line in lines)

    table = tmp_path / "kernels.csv"
    for _ in range(2):
        measure.write_csv(table, rows, timing.environment())
    written = list(csv.DictReader(table.read_text().splitlines()))
    assert len(written) == 2 * len(rows)
    assert {"date", "gpu", "driver", "torch", "cuda", "pyadapt"} <= set(written[0])


def test_a_missing_floor_is_a_miss():
    point = kernels.Point(8192, 4096, 4096, 16, "16", 0.0)
    rows = kernels.rows_of(point, {"1 linear_forward": measure.Timing([1.0])}, CEILINGS, HOPPER)
    assert math.isnan(rows[0]["over_floor"])
    assert rows[0]["verdict"] == "miss"


def test_grids():
    grid = kernels.points()
    assert len(grid) == len(set(grid))
    assert {point.M for point in grid} == {1, 16, 64, 512, 2048, 8192}
    assert {point.base for point in grid[:2]} == {"16", "int8"}
    grid = layers.points()
    assert len(grid) == len(set(grid)) == 5 * 3 * 3 * 2
    assert (grid[0].M, grid[0].r, grid[0].dropout) == (2048, 16, 0.0)


def test_rows_of_layers():
    point = layers.Point(512, 4096, 4096, 16, 0.05)
    graph = {"torch frozen": (1.0, 3.0), "pyadapt lora": (1.1, 3.5), "peft lora": (2.2, 7.0)}
    found = {
        f"{name}, {part}": measure.Timing([ms])
        for name, pair in graph.items()
        for part, ms in zip(("forward", "step"), pair, strict=True)
    }
    eager = {name: measure.Timing([2 * t.median]) for name, t in found.items()}
    rows = layers.rows_of(point, found, eager, {"peft lora, step": "noted"})
    ours = {row["pass"]: row for row in rows if row["case"] == "pyadapt lora"}
    assert [ours[part]["graph_ms"] for part in ("forward", "backward", "step")] == pytest.approx([1.1, 2.4, 3.5])
    assert ours["backward"]["over torch frozen"] == pytest.approx(1.2)
    assert ours["forward"]["over peft lora"] == pytest.approx(0.5)
    assert ours["step"]["over peft lora compiled"] == ""
    assert ours["step"]["eager_ms"] == pytest.approx(7.0)
    assert [row["note"] for row in rows if row["case"] == "peft lora"] == ["", "", "noted"]
    summary = layers.headline(rows)
    assert "1.167 / 0.5 / -" in summary[-1]
    assert len(layers.table(rows).splitlines()) == 1 + len(rows)


def test_layers_compute_the_same():
    pytest.importorskip("peft", reason="waits for peft: it is one of the cases")
    point = layers.Point(5, 64, 48, 4, 0.0)
    names = (layers.FLOOR, layers.OURS, layers.OURS_INT8, layers.PEFT)
    made = layers.layers_of(point, names, 2, torch.float32, "cpu")
    with torch.no_grad():
        for name in (layers.OURS, layers.PEFT):  # B starts at zero, where all layers are the frozen one
            made[name][1].trained[1].normal_()
    runs = layers.runs_of(made)
    assert set(runs) == {f"{name}, {part}" for name in names for part in ("forward", "step")}
    exact = runs["torch frozen, forward"](0)
    for name in names[1:]:
        off = 6e-2 if "int8" in name else 1e-5
        torch.testing.assert_close(runs[f"{name}, forward"](0), exact, rtol=0, atol=off)
        dx, dA, dB = runs[f"{name}, step"](1)
        assert (dx.shape, dA.shape, dB.shape) == ((5, 64), (4, 64), (48, 4))
        assert (runs[f"{name}, forward"](1) - runs["torch frozen, forward"](1)).abs().max() > 0


@pytest.mark.parametrize("module", [kernels, layers])
def test_without_a_gpu(module, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def rows_of_calls(M, base, dropout):
    """The rows of a small shape, every call made once."""
    point = kernels.Point(M, 72, 40, 4, base, dropout)
    cases = kernels.cases_of(point, torch.bfloat16, [kernels.operands_of(point, torch.bfloat16, "cpu")] * 2)
    found, failed = timing.interleave(cases, 2, 0.0, lambda run, copies: lambda: float(run(copies - 1) is not None))
    assert failed == {}
    rows = kernels.rows_of(point, found, CEILINGS, AMPERE)
    assert {"6 skinny forward"} == {row["kernel"] for row in rows} if M == 16 else len(rows) >= 6
    return rows


CALLS = [(M, base, dropout) for M in (16, 65) for base in kernels.BASES for dropout in (0.0, 0.05)]


@pytest.mark.parametrize(("M", "base", "dropout"), CALLS)
def test_calls_by_their_arguments(M, base, dropout, monkeypatch):
    """The CPU kernels have the same functions."""
    from pyadapt.ops import kernels as native_kernels

    if not native.available():
        pytest.skip("waits for the native extension: pip install -e .")
    monkeypatch.setattr(native_kernels, "cuda", native_kernels.cpu)
    rows_of_calls(M, base, dropout)


@pytest.mark.slow
@pytest.mark.parametrize(("M", "base", "dropout"), CALLS)
def test_every_kernel_is_called_rightly(M, base, dropout):
    """The calls that are timed, on the emulated device."""
    from emulator import build, control

    module = build.load()
    control.set_capability(module, 80)
    with native.emulating_cuda(module):
        rows_of_calls(M, base, dropout)
