"""Timing on a GPU: graph replays between events, cases in turns, ceilings measured on the spot, a limit on the whole.

A case is a function of the number of a copy of its data. There are as many copies as it takes to hold several times the
L2 cache, and a replay goes through all of them: what is timed reads memory, as a layer of a model does.
"""

from __future__ import annotations

import datetime
import math
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

import pyadapt
from benchmarks.measure import Timing

Run = Callable[[int], object]
Replay = Callable[[], float]  # milliseconds a call
Prepare = Callable[[Run, int], Replay]

WARM_UP = 3
LEAST_REPLAY = 2.0  # milliseconds between two events
LEAST_ROUNDS, MOST_ROUNDS = 5, 100
L2_MULTIPLE, MOST_COPIES, MEMORY_SHARE = 4, 64, 0.2


@dataclass
class Deadline:
    """How long all of a benchmark may take, and what it has left out for that."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The time runs from here."""
        self._end = self.clock() + self.seconds

    def left(self) -> float:
        """Seconds."""
        return self._end - self.clock()

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for something that takes so long; if not, it is noted as left out."""
        if self.left() > seconds:
            return True
        self.left_out.append(what)
        return False

    def report(self) -> str:
        """A line on what is missing."""
        if not self.left_out:
            return "nothing left out"
        shown = ", ".join(self.left_out[:4]) + (", ..." if len(self.left_out) > 4 else "")
        return f"left out for time: {len(self.left_out)} ({shown})"


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best, measured here."""

    bandwidth: float  # bytes/s, read and written, of a large copy
    arithmetic: float  # operations/s of a large 16-bit matrix product

    def floor_ms(self, operations: float, moved: float) -> float:
        """The least time for so much arithmetic and traffic."""
        return 1e3 * max(operations / self.arithmetic, moved / self.bandwidth)

    def __str__(self) -> str:
        """For a table's head."""
        return f"copy {self.bandwidth / 1e9:.0f} GB/s, 16-bit product {self.arithmetic / 1e12:.0f} TFLOP/s"


def copies_of(call_bytes: float, copy_bytes: float, l2_bytes: int | None = None, memory: int | None = None) -> int:
    """How many copies of a call's data to rotate through: two at least, so that none follows itself.

    Enough that what one call reads comes to several times the L2 cache, in a share of the GPU's memory.
    """
    if l2_bytes is None or memory is None:
        properties = torch.cuda.get_device_properties(0)
        l2_bytes, memory = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20, properties.total_memory
    wanted = math.ceil(L2_MULTIPLE * l2_bytes / max(call_bytes, 1))
    return max(2, min(wanted, MOST_COPIES, int(MEMORY_SHARE * memory / max(copy_bytes, 1))))


def captured(run: Run, copies: int) -> torch.cuda.CUDAGraph:
    """A graph of one call of each copy, after calls that settle autotuning and lazy set-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(WARM_UP):
            run(i % copies)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    return graph


def graph_timer(run: Run, copies: int) -> Replay:
    """Milliseconds a call of a graph's replay: what the GPU takes, without the host."""
    graph = captured(run, copies)

    def timed(times: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    timed(1)
    times = math.ceil(LEAST_REPLAY / max(timed(1), 1e-3))
    return lambda: timed(times) / copies


def eager_timer(run: Run, copies: int) -> Replay:
    """Milliseconds a call as Python makes it: the longer of what the host and what the GPU takes."""
    for i in range(WARM_UP):
        run(i % copies)

    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(copies):
            run(i)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / copies

    return once


def interleave(
    cases: Mapping[str, Run],
    copies: int,
    seconds: float,
    prepare: Prepare = graph_timer,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """(times of the cases, taken in turns for about ``seconds``; why a case has none: its error)."""
    replays, failed = {}, {}
    for name, run in cases.items():
        try:
            replays[name] = prepare(run, copies)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    timings = {name: Timing() for name in replays}
    end = clock() + seconds
    for i in range(MOST_ROUNDS if replays else 0):
        for name, replay in replays.items():
            timings[name].times.append(replay())
        if clock() > end and i + 1 >= LEAST_ROUNDS:
            break
    return timings, failed


def measured_ceilings(dtype: torch.dtype, size: int = 8192, copied: int = 2 << 30) -> Ceilings:
    """A copy of 2 GiB and a product of 8192^3, on random numbers: zeros run faster than real data."""
    source = torch.randint(256, (copied,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    runs = {"copy": lambda _: target.copy_(source), "product": lambda _: left @ right}
    timings, failed = interleave(runs, 1, 2.0)
    if failed:
        raise RuntimeError(f"the ceilings could not be measured: {failed}")
    return Ceilings(2e3 * copied / timings["copy"].median, 2e3 * size**3 / timings["product"].median)


def driver() -> str:
    """The driver's version."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def environment() -> dict[str, str]:
    """The columns that say where a row was measured."""
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(0) if gpu else "none",
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "pyadapt": pyadapt.__version__,
    }


def activation_dtype(capability: tuple[int, int]) -> torch.dtype:
    """bf16 where the GPU has it."""
    return torch.bfloat16 if capability >= (8, 0) else torch.float16
