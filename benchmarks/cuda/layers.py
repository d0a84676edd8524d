"""A LoRA layer against the frozen one and against peft's: ``python -m benchmarks.cuda.layers``.

Cases: torch.nn.Linear with a frozen 16-bit weight (the floor), pyadapt over 16 bits and over its int8, peft's layer
with its defaults (fp32 adapters), and torch.compile of peft's. Forward, and forward with backward (a step); the
backward is their difference. ``graph_ms`` is a CUDA graph's replay, the GPU's own time; ``eager_ms`` is what calls from
Python take. Cases of one shape are timed in turns in one process, over copies of the data that hold several times the
L2 cache.

peft has no int8 base without bitsandbytes: all ratios of int8 are over 16-bit layers too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyadapt
from benchmarks.cuda import timing
from benchmarks.cuda.timing import Deadline, Run
from benchmarks.measure import Timing, write_csv

RESULTS = Path(__file__).parents[1] / "results" / "cuda_layers.csv"
SECONDS = 420.0
COMPILED_SHARE = 0.4  # of the time, for torch.compile of peft's layer
COMPILING = 25.0  # seconds to leave for compiling one
ROWS, SHAPES, RANKS, DROPOUTS = (
    (2048, 1, 8192, 16, 512),
    ((4096, 4096), (4096, 11008), (8192, 8192)),
    (16, 8, 64),
    (0.0, 0.05),
)
FLOOR, OURS, OURS_INT8 = "torch frozen", "pyadapt lora", "pyadapt lora int8"
PEFT, COMPILED = "peft lora", "peft lora compiled"
ALL = (FLOOR, OURS, OURS_INT8, PEFT, COMPILED)


@dataclass(frozen=True)
class Point:
    """One shape."""

    M: int
    K: int
    N: int
    r: int
    dropout: float

    def __str__(self) -> str:
        """Short, for tables."""
        return f"M={self.M} K={self.K} N={self.N} r={self.r} p={self.dropout:g}"


def points() -> list[Point]:
    """The grid, the most telling first: rank 16 without dropout over every size, then dropout, then other ranks."""
    return [Point(M, K, N, r, p) for r in RANKS for p in DROPOUTS for K, N in SHAPES for M in ROWS]


@dataclass
class Layer:
    """One case's layer on one copy of the data."""

    module: Callable[[Tensor], Tensor]
    x: Tensor
    g: Tensor
    trained: list[Tensor]

    def forward(self) -> Tensor:
        """As in training: what backward needs is kept."""
        return self.module(self.x)

    def step(self) -> tuple[Tensor | None, ...]:
        """Forward and backward, gradients thrown away."""
        return torch.autograd.grad(self.forward(), [self.x, *self.trained], self.g)


def frozen(weight: Tensor) -> nn.Sequential:
    """A model of one frozen linear layer."""
    N, K = weight.shape
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(K, N, bias=False, dtype=weight.dtype))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def by_pyadapt(weight: Tensor, point: Point, int8: bool) -> nn.Module:
    """The adapted layer, over a copy of the weight in int8 if asked."""
    model = frozen(weight.clone()) if int8 else frozen(weight)
    if int8:
        model = pyadapt.quantize(model, "int8")
    config = pyadapt.LoraConfig(r=point.r, lora_alpha=2 * point.r, lora_dropout=point.dropout, target_modules=["0"])
    return pyadapt.wrap(model, config).train()[0]


def by_peft(weight: Tensor, point: Point) -> nn.Module:
    """peft's layer with its defaults."""
    import peft

    config = peft.LoraConfig(r=point.r, lora_alpha=2 * point.r, lora_dropout=point.dropout, target_modules=["0"])
    return peft.get_peft_model(frozen(weight), config).train().base_model.model[0]


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def layers_of(
    point: Point, names: tuple[str, ...], copies: int, dtype: torch.dtype, device: str
) -> dict[str, list[Layer]]:
    """Every case's layers, a copy of the data each; the weight of a copy is shared by the 16-bit cases."""
    compiled = torch.compile(_call, dynamic=False) if COMPILED in names else None
    made: dict[str, list[Layer]] = {name: [] for name in names}
    for _ in range(copies):
        weight = (torch.randn(point.N, point.K, device=device) / point.K**0.5).to(dtype)
        x = torch.randn(point.M, point.K, device=device).to(dtype).requires_grad_()
        g = torch.randn(point.M, point.N, device=device).to(dtype)
        for name in names:
            module: Any
            if name == FLOOR:
                module = frozen(weight)[0]
            elif name in (PEFT, COMPILED):
                module = by_peft(weight, point)
            else:
                module = by_pyadapt(weight, point, int8=name == OURS_INT8)
            trained = [p for p in module.parameters() if p.requires_grad]
            call = (lambda x, module=module: compiled(module, x)) if name == COMPILED and compiled else module
            made[name].append(Layer(call, x, g, trained))
    return made


def runs_of(layers: dict[str, list[Layer]]) -> dict[str, Run]:
    """Forward and step of each case: ``case, pass`` by name."""
    runs: dict[str, Run] = {}
    for name, copies in layers.items():
        runs[f"{name}, forward"] = lambda i, copies=copies: copies[i].forward()
        runs[f"{name}, step"] = lambda i, copies=copies: copies[i].step()
    return runs


def rows_of(
    point: Point, graph: dict[str, Timing], eager: dict[str, Timing], failed: dict[str, str]
) -> list[dict[str, object]]:
    """A row for each case and pass; ratios are of graph times, over those of other cases of the same run."""

    def median(timings: dict[str, Timing], name: str, part: str) -> float | None:
        if part == "backward":
            step, forward = (median(timings, name, p) for p in ("step", "forward"))
            return None if step is None or forward is None else step - forward
        timing = timings.get(f"{name}, {part}")
        return None if timing is None else timing.median

    rows = []
    for name in ALL:
        for part in ("forward", "backward", "step"):
            time, eager_time = median(graph, name, part), median(eager, name, part)
            if time is None and eager_time is None:
                continue
            row: dict[str, object] = {"case": name, "pass": part, "M": point.M, "K": point.K, "N": point.N}
            row |= {"r": point.r, "dropout": point.dropout, "graph_ms": rounded(time), "eager_ms": rounded(eager_time)}
            for other in (FLOOR, PEFT, COMPILED):
                row[f"over {other}"] = ratio(time, median(graph, other, part))
            row[f"eager over {FLOOR}"] = ratio(eager_time, median(eager, FLOOR, part))
            row[f"eager over {PEFT}"] = ratio(eager_time, median(eager, PEFT, part))
            row["note"] = failed.get(f"{name}, {part}", "")
            rows.append(row)
    return rows


def rounded(ms: float | None) -> float | str:
    """For a table; an absent time is an empty cell."""
    return "" if ms is None else round(ms, 5)


def ratio(ms: float | None, other: float | None) -> float | str:
    """ms / other, empty where either is absent."""
    return "" if ms is None or not other else round(ms / other, 3)


def table(rows: list[dict[str, object]]) -> str:
    """The rows of one shape for reading."""
    lines = [f"{'case':20}{'pass':9}{'graph ms':>10}{'eager ms':>10}{'/ frozen':>10}{'/ peft':>9}{'/ compiled':>11}"]
    for row in rows:
        ratios = row[f"over {FLOOR}"], row[f"over {PEFT}"], row[f"over {COMPILED}"]
        lines.append(
            f"{row['case']:20}{row['pass']:9}{row['graph_ms']:>10}{row['eager_ms']:>10}"
            f"{ratios[0]:>10}{ratios[1]:>9}{ratios[2]:>11}"
        )
    return "\n".join(lines)


def headline(rows: list[dict[str, object]]) -> list[str]:
    """Steps of rank 16: pyadapt's ratio to the floor, to peft's layer and to its compiled form, by rows of x."""
    lines = [
        f"{'step, r=16':26}" + "".join(f"{'M=' + str(M):>20}" for M in sorted(ROWS)),
        f"{'':26}(over frozen / peft / compiled)",
    ]
    for name in (OURS, OURS_INT8):
        for K, N in SHAPES:
            for p in DROPOUTS:
                cells = []
                for M in sorted(ROWS):
                    wanted = {"case": name, "pass": "step", "M": M, "K": K, "N": N, "r": 16, "dropout": p}
                    found = [row for row in rows if wanted.items() <= row.items()]
                    columns = (f"over {FLOOR}", f"over {PEFT}", f"over {COMPILED}")
                    best = [next((str(row[c]) for row in reversed(found) if row[c] != ""), "-") for c in columns]
                    cells.append(" / ".join(best) if found else "-")
                if any(cell != "-" for cell in cells):
                    title = f"{'int8' if name == OURS_INT8 else '16 bits'} {K}x{N} p={p:g}"
                    lines.append(f"{title:26}" + "".join(f"{cell:>20}" for cell in cells))
    return lines


def copies_for(point: Point, names: tuple[str, ...]) -> int:
    """Enough for the L2 cache, and few enough for the GPU's memory."""
    weight, activations = 2 * point.N * point.K, 2 * point.M * (point.K + point.N)
    return timing.copies_of(weight / 2 + activations, 3 * (weight + activations) * len(names))


def measure_point(
    point: Point, names: tuple[str, ...], dtype: torch.dtype, seconds: float
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """(the rows of one shape, what failed)."""
    layers = layers_of(point, names, min(copies_for(point, names), 16), dtype, "cuda")
    copies = len(layers[FLOOR])
    eager, failed = timing.interleave(runs_of(layers), copies, seconds / 3, timing.eager_timer)
    graph, without_graph = timing.interleave(runs_of(layers), copies, seconds, timing.graph_timer)
    notes = {**{name: f"no graph: {error}" for name, error in without_graph.items()}, **failed}
    return rows_of(point, graph, eager, notes), notes


def measure(deadline: Deadline, seconds_a_shape: float, csv: Path | None) -> tuple[list[dict[str, object]], list[str]]:
    """(rows, failures): first all shapes without torch.compile, then with it for rank 16."""
    dtype = timing.activation_dtype(torch.cuda.get_device_capability())
    where = {**timing.environment(), "dtype": str(dtype).removeprefix("torch."), "peft": peft_version()}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows: list[dict[str, object]] = []
    failures: list[str] = []
    compiled_from = COMPILED_SHARE * deadline.seconds
    plan = [(point, ALL[:-1], compiled_from) for point in points()]
    plan += [(point, ALL, COMPILING) for point in points() if point.r == 16]
    for point, names, reserve in plan:
        if not deadline.allows(f"{point}{' compiled' if COMPILED in names else ''}", reserve + 2 * seconds_a_shape):
            continue
        fresh, failed = measure_point(point, names, dtype, seconds_a_shape)
        print(f"\n{point}\n{table(fresh)}", flush=True)
        for name, error in failed.items():
            print(f"{name:30} {error}")
        failures += [f"{point}, {name}: {error}" for name, error in failed.items() if name.startswith("pyadapt")]
        if csv and fresh:
            write_csv(csv, fresh, where)
        rows += fresh
        torch.compiler.reset()
    return rows, failures


def peft_version() -> str:
    """The version of peft."""
    import peft

    return peft.__version__


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, append to the CSV; 1 where a case of pyadapt failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="benchmarks.cuda.layers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default %(default)s)")
    parser.add_argument("--seconds-a-shape", type=float, default=0.8, help="of measuring (default %(default)s)")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="append the rows here (default %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.cuda.layers needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    deadline = Deadline(options.seconds)
    rows, failures = measure(deadline, options.seconds_a_shape, options.csv)
    print("\nsummary: layers", *headline(rows), deadline.report(), sep="\n")
    for failure in failures[:4]:
        print(f"failed {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
