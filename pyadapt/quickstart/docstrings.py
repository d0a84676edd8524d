"""The built-in data set: docstrings of the standard library, to be told apart by their package.

Source files are read and parsed, never imported. The split is by module, so that the held-out
texts come from files that training has not seen; every label's own name is cut out of every text.
"""

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .errors import QuickstartError
from .examples import Example, Split, balanced, by_label, without_duplicates

# Packages that every CPython since 3.10 has, Debian's minimal python3 included. Those that
# distributions strip or split off (tkinter, idlelib, lib2to3, distutils, test) are left out.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")

SHORTEST = 40  # characters; below that a docstring says too little ("Return a copy.")
LONGEST = 600  # characters of a docstring that are kept: more than --max-length tokens hold
HELDOUT_SHARE = 0.35
FEWEST_CLASSES = 8
# Texts of a label, so that a run stays short: every epoch asks all that are held out.
MOST_TRAIN = 90
MOST_HELDOUT = 25

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LABEL_NAMES = re.compile("|".join(PACKAGES), re.IGNORECASE)


def split_docstrings(seed: int, stdlib: Path | None = None) -> Split:
    """Balanced training and held-out docstrings of the standard library, the same for the same seed.

    Raises QuickstartError where the library's source files are not installed.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    classes = by_label(without_duplicates(_documentation(stdlib)))
    if len(classes) < FEWEST_CLASSES:
        raise QuickstartError(
            f"found docstrings of {len(classes)} standard packages under {stdlib}, need {FEWEST_CLASSES}: "
            "install the Python sources (Debian: libpython3-stdlib) or pass --data"
        )
    train: list[Example] = []
    heldout: list[Example] = []
    for members in classes.values():
        modules = _modules_to_hold_out(members, seed)
        for example in members:
            (heldout if example.group in modules else train).append(example)
    return Split(balanced(train, MOST_TRAIN, seed), balanced(heldout, MOST_HELDOUT, seed), list(classes))


def docstrings(source: bytes) -> Iterator[str]:
    """Every docstring in a source file, label names and layout removed, where enough of it remains."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            text = " ".join(_LABEL_NAMES.sub(" ", text).split())[:LONGEST]
            if len(text) >= SHORTEST:
                yield text


def _documentation(stdlib: Path) -> Iterator[Example]:
    for package in PACKAGES:
        for path in sorted((stdlib / package).rglob("*.py")):
            module = path.relative_to(stdlib).as_posix()
            for text in docstrings(path.read_bytes()):
                yield Example(text, label=package, group=module)


def _modules_to_hold_out(members: list[Example], seed: int) -> set[str]:
    """Modules that together hold at most HELDOUT_SHARE of a package's texts, taken in a seeded order."""
    sizes = Counter(example.group for example in members)
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    room = HELDOUT_SHARE * len(members)
    chosen = set()
    for module in order:
        if sizes[module] <= room:
            chosen.add(module)
            room -= sizes[module]
    return chosen
