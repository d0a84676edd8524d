"""Bytes a rank and communication a step under each engine, beside the formulas: ``python -m benchmarks.scaling``.

A small Llama on 1, 2 and 4 gloo processes. Of its own tensors each process counts all; see `recorder` and `transport`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
from pathlib import Path

from benchmarks.measure import write_csv

from . import formulas, page
from .engines import ENGINES, Plan
from .measure import Case, Measured, activations
from .processes import on_ranks

RANKS = (1, 2, 4)


def cases() -> list[Case]:
    """LoRA under every engine, int8 bases, and training everything."""
    found = [Case(Plan(engine)) for engine in ENGINES]
    found[3:3] = [Case(Plan("fsdp2"), "int8"), Case(Plan("fsdp2"), method="full"), Case(Plan("ddp"), method="full")]
    return [*found, Case(Plan("zero3"), "int8")]


def row(case: Case, ranks: int, measured: Measured) -> dict[str, object]:
    """Of the CSV: what was measured, and what the formulas say."""
    engine, weights = case.plan.engine, measured.weights
    memory = formulas.memory(engine, weights, ranks)
    traffic = formulas.traffic(engine, weights, ranks)
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "broadcast")
    return {
        "engine": engine,
        "base": case.base,
        "method": case.method,
        "ranks": ranks,
        "start": measured.at_start,
        "start_formula": memory.at_start,
        "gradients": measured.gradients,
        "gradients_formula": memory.gradients,
        "optimizer": measured.optimizer,
        "optimizer_formula": memory.optimizer,
        "total": measured.total,
        "total_formula": memory.total + activations(case),
        **{kind: measured.traffic.size.get(kind, 0) for kind in kinds},
        "sent": round(measured.traffic.sent(ranks)),
        "sent_formula": round(traffic.sent(ranks)),
        "calls": sum(measured.traffic.calls.values()),
        "calls_formula": sum(traffic.calls.values()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append to a CSV where one is named."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS, help="numbers of processes (default 1 2 4)")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/scaling.md again")
    options = parser.parse_args(arguments)
    if options.page:
        page.write()
        return
    rows = [
        row(case, ranks, found)
        for ranks in options.ranks
        for case, found in zip(cases(), on_ranks(ranks, cases()), strict=True)
    ]
    for line in rows:
        print(", ".join(f"{key} {value}" for key, value in line.items()))
    if options.csv:
        versions = {
            name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers", "pyadapt")
        }
        write_csv(options.csv, rows, {"date": datetime.date.today().isoformat(), **versions})


if __name__ == "__main__":
    main()
