"""The user's own data: JSON lines of a text, a label, and perhaps the group that a text belongs to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import QuickstartError
from .examples import Example, Split, by_label, hold_out, without_duplicates

HELDOUT_SHARE = 0.2


def split_jsonl(path: Path, seed: int) -> Split:
    """Read `path` and hold out a fifth of it: whole groups where rows have one, else texts of every label.

    A hash of the group or text with the seed decides which texts are held out, not their order in the file.
    Raises QuickstartError naming the line of a bad row, or what is missing from the whole.
    """
    rows = list(_rows(path))
    if not rows:
        raise QuickstartError(f'{path} has no rows; each line is to be {{"text": ..., "label": ...}}')
    examples = without_duplicates(rows)
    classes = by_label(examples)
    if len(classes) < 2:
        given = len({row.label for row in rows})
        raise QuickstartError(
            f"{path} has {given} label(s), {len(classes)} of them on texts that bear no other label; need at least two"
        )
    heldout = _heldout_groups(classes, seed)
    split = Split(
        train=[example for example in examples if example.group not in heldout],
        heldout=[example for example in examples if example.group in heldout],
        labels=list(classes),
    )
    if not split.heldout:
        raise QuickstartError(f"{path} has too few texts or groups to hold any out; need two of some label")
    if untaught := set(classes) - set(by_label(split.train)):
        raise QuickstartError(
            f"{path}: all rows of label {min(untaught)!r} are held out; give it more groups or another --seed"
        )
    return split


def _heldout_groups(classes: dict[str, list[Example]], seed: int) -> set[str]:
    groups = Counter(example.group for members in classes.values() for example in members)
    if any(count > 1 for count in groups.values()):
        return hold_out(groups, HELDOUT_SHARE, seed)
    # Every text stands for itself: hold out a share of each label, so that no label goes untested.
    return {
        group
        for members in classes.values()
        for group in hold_out((example.group for example in members), HELDOUT_SHARE, seed)
    }


def _rows(path: Path) -> Iterator[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise QuickstartError(f"--data {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise QuickstartError(
            f"--data {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _example(line, f"{path} line {number}")


def _example(line: str, where: str) -> Example:
    try:
        row: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise QuickstartError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise QuickstartError(f'{where} is a {type(row).__name__}, need an object {{"text": ..., "label": ...}}')
    text = _field(row, "text", (str,), where)
    if not text.strip():
        raise QuickstartError(f"{where}: the text is empty")
    label = str(_field(row, "label", (str, int), where))
    if not label.strip():
        raise QuickstartError(f"{where}: the label is empty")
    group = str(_field(row, "group", (str, int), where)) if "group" in row else text
    return Example(text, label, group)


def _field(row: dict[str, Any], name: str, kinds: tuple[type, ...], where: str) -> Any:
    if name not in row:
        raise QuickstartError(f"{where} has no {name!r}; its keys are {sorted(row)}")
    value = row[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise QuickstartError(f"{where}: {name!r} is a {type(value).__name__}, need {wanted}")
    return value
