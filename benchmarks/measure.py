"""Timing for every benchmark: cases taken in turns in one process, medians, and what machine it was."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import pyadapt
from pyadapt import native


@dataclass
class Timing:
    """The times of one case, in milliseconds."""

    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle time."""
        return statistics.median(self.times)

    def quantile(self, q: float) -> float:
        """The time that a share q of the runs stayed under."""
        return sorted(self.times)[min(int(q * len(self.times)), len(self.times) - 1)]


def interleave(cases: dict[str, Callable[[], object]], seconds: float, most: int = 200) -> dict[str, Timing]:
    """Run the cases in turns for about ``seconds``, at least three times each: a slow spell of the machine hits all."""
    timings = {name: Timing() for name in cases}
    for run in cases.values():
        run()  # warm caches, thread teams and lazy imports
    end = time.perf_counter() + seconds
    while len(next(iter(timings.values())).times) < most:
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            timings[name].times.append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() > end and len(timings[name].times) >= 3:
            break
    return timings


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.M) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def environment() -> dict[str, str]:
    """The columns that say where a row was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "isa": native.isa() or "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "pyadapt": pyadapt.__version__,
    }


def write_csv(path: Path, rows: Iterable[dict[str, object]], where: dict[str, str] | None = None) -> None:
    """Append rows, with a header where the file is new; ``where`` stands for ``environment()``."""
    where = environment() if where is None else where
    rows = [{**where, **row} for row in rows]
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
