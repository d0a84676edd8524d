"""Faults to put into the kernels on purpose, each of which the source route has to find: the test of the net itself.

faults/<stem>.py holds FAULTS, a list of Fault, for csrc/cuda/<stem>.cu and the headers it includes.
"""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Fault:
    """One substitution of text in a kernel's source.

    Attributes:
        name: What is wrong then, in a few words.
        file: The file, relative to csrc/cuda.
        old: Text that occurs in it exactly once.
        new: What stands there instead.
        caught_by: The flavour that finds it (plain, address, thread): it is tried first, the others after it.
        architecture: The architecture on which it shows.
    """

    name: str
    file: str
    old: str
    new: str
    caught_by: str = "plain"
    architecture: int = 800


def stems() -> list[str]:
    """The kernel families that have a list."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def faults_of(stem: str) -> list[Fault]:
    """The list of one family; empty where it has none."""
    return list(importlib.import_module(f"{__name__}.{stem}").FAULTS) if stem in stems() else []


def seed(fault: Fault, csrc: Path, folder: Path) -> Path:
    """A copy of csrc with the fault in it, under `folder`. Raises ValueError where its place is not found."""
    copy = folder / "csrc"
    for part in ("core", "cuda"):
        shutil.copytree(csrc / part, copy / part)
    source = copy / "cuda" / fault.file
    text = source.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name!r}: {fault.file} holds {fault.old!r} {text.count(fault.old)} times, not once")
    if fault.new == fault.old:
        raise ValueError(f"{fault.name!r} changes nothing")
    source.write_text(text.replace(fault.old, fault.new))
    return copy
