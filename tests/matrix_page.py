"""docs/models.md: the results of the matrix, a table a task. `python tests/matrix_page.py` runs all and writes it."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path

from matrix import CELLS, LETTERS, Key, Result, run
from matrix_table import METHODS
from models.zoo import MODELS

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

_INTRODUCTION = """\
# Methods, models and tasks

Every method on every model and task, as tiny random models of the real classes. `python tests/matrix_page.py` runs the
whole matrix and writes this page; `tests/test_matrix.py` runs every cell and fails where the page says something else.

A cell says what was checked:

{legend}

What is not there is said in a footnote.
"""


def render(results: dict[Key, Result]) -> str:
    """The page."""
    notes: dict[str, int] = {}
    legend = "\n".join(f"- {letter}: {meaning}" for letter, meaning in LETTERS.items())
    parts = [_INTRODUCTION.format(legend=legend)]
    for section in dict.fromkeys(row.section for row in MODELS):
        lines = [_line("model", "class", *(method.name for method in METHODS))]
        lines.append(_line(*["---"] * (2 + len(METHODS))))
        for row in MODELS:
            if row.section == section:
                cells = (results[section, row.name, method.name] for method in METHODS)
                lines.append(_line(row.name, f"`{row.model_class}`", *(_cell(cell, notes) for cell in cells)))
        parts.append(f"## {section}\n\n" + "\n".join(lines) + "\n")
    parts.append("\n".join(f"[^{number}]: {note}" for note, number in notes.items()) + "\n")
    return "\n".join(parts)


def parse(text: str) -> dict[Key, Result]:
    """The results that a page tells of."""
    notes: dict[str, str] = dict(re.findall(r"^\[\^(\d+)\]: (.+)$", text, re.MULTILINE))
    results: dict[Key, Result] = {}
    section = ""
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if line.startswith("## "):
            section, columns = line.removeprefix("## "), []
        elif cells and not columns:
            columns = cells[2:]
        elif cells and cells[0] != "---":
            for column, cell in zip(columns, cells[2:], strict=True):
                letters, _, number = cell.partition("[^")
                note = notes[number.removesuffix("]")] if number else ""
                results[section, cells[0], column] = Result(letters.strip(), note)
    return results


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(result: Result, notes: dict[str, int]) -> str:
    number = f"[^{notes.setdefault(result.note, len(notes) + 1)}]" if result.note else ""
    return f"{result.letters} {number}".strip()


def run_all() -> dict[Key, Result]:
    """Run every cell, one after the other.

    Raises:
        RuntimeError: one failed; it is named.
    """
    results = {}
    for cell, (row, method) in CELLS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[cell] = run(row, method, Path(folder))
            except Exception as error:
                raise RuntimeError(f"{' / '.join(cell)}: {error}") from error
    return results


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYADAPT_AUTOTUNE"] = "0"
    # What is chosen for each model, and what the libraries remark.
    logging.disable(logging.WARNING)
    PAGE.write_text(render(run_all()), encoding="utf-8")
