"""The tables of docs/scaling.md, made of committed rows and of the formulas."""

from __future__ import annotations

import csv
from pathlib import Path

from . import llama

ROWS = Path(__file__).parents[1] / "results" / "scaling.csv"
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
PARTS = ("start", "gradients", "optimizer", "total")


def measured() -> str:
    """What was measured beside the formulas, in kB."""
    with ROWS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| engine | base | trained | ranks | at start | gradients | optimizer | most at once | sent a step, in calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = [f"{_kb(row[part])} ({_kb(row[f'{part}_formula'])})" for part in PARTS]
        moved = f"{_kb(row['sent'])} ({_kb(row['sent_formula'])}), {row['calls']} ({row['calls_formula']})"
        head = [row["engine"], row["base"], row["method"], row["ranks"]]
        lines.append("| " + " | ".join([*head, *parts, moved]) + " |")
    return "\n".join(lines)


def seventy() -> str:
    """Llama-70B: bytes a GPU by part, and what a step sends."""
    lines = [
        "| engine | base | GPUs | parameters | engine's own | gradients | AdamW | gathered | activations | all, GB "
        "| fits 80 GB | sent a step, GB | bandwidth that hides it, GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    seconds = llama.step_seconds(llama.TOKENS)
    for row in llama.rows():
        parts = [row.memory.parameters, row.memory.buffers, row.memory.gradients, row.memory.optimizer]
        parts += [row.memory.gathered, row.activations]
        fits = "yes" if row.total < llama.GPU_MEMORY else "no"
        figures = [f"{part / 1e9:.2f}" for part in parts]
        moved = [f"{row.sent / 1e9:.1f}", f"{row.sent / 1e9 / seconds:.1f}"]
        cells = [row.engine, row.base, str(row.ranks), *figures, f"{row.total / 1e9:.1f}", fits, *moved]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kb(size: str) -> str:
    return f"{float(size) / 1e3:.0f}"


TABLES = {"measured": measured, "llama-70b": seventy}


def write() -> None:
    """Put the tables into the page, between their marks."""
    text = PAGE.read_text()
    for name, make in TABLES.items():
        begin, end = (f"<!-- {name}: {what} -->" for what in ("begin", "end"))
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)
