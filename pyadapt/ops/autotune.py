"""Which of several routes is the fastest on this GPU: measured once a shape, remembered in a file.

Whether a native kernel or torch's GEMM serves a shape best is for the GPU and torch's build to say. So the first call
of a shape times both, and later calls and processes find the answer in the cache folder: ``PYADAPT_CACHE``, else
``$XDG_CACHE_HOME/pyadapt``, else ``~/.cache/pyadapt``.

Routes round differently, and so measuring makes the last bits of a result depend on the machine and on what else it did
meanwhile. With ``PYADAPT_AUTOTUNE=0`` (the default is 1), and under ``torch.use_deterministic_algorithms``, nothing is
measured or looked up: a static rule has to decide, from dtypes and sizes alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import statistics
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from pyadapt import files, native

WARM_UP, TURNS = 1, 5  # turns of each candidate that do not count, and that do

Times = dict[str, float]  # microseconds by route
Candidate = Callable[[], object]
Timer = Callable[[Candidate], float]


def key_of(
    op: str, x: torch.dtype, weight: torch.dtype, weight_rows: bool, M: int, N: int, K: int, r: int, dropout: bool
) -> str:
    """What calls must have in common to share a measurement, e.g. "forward bfloat16 int8 rows M512 N96 K64 r16 plain".

    Ragged M go by the next power of two, r by the next multiple of 16. ``weight_rows``: W has unit stride along K.
    """
    dtypes = f"{x} {weight}".replace("torch.", "")
    sizes = f"M{1 << max(M - 1, 0).bit_length()} N{N} K{K} r{-(-r // 16) * 16}"
    return f"{op} {dtypes} {'rows' if weight_rows else 'columns'} {sizes} {'dropout' if dropout else 'plain'}"


class Measurements:
    """Median times by key and route, in memory and, with a path, in a file, which must be of the same machine."""

    def __init__(self, machine: str, path: Path | None) -> None:
        self._header, self._path = f"autotune 1, {machine}", path
        self._known: dict[str, Times] | None = None  # never changed, only replaced: readers hold no lock
        self._lock = threading.RLock()

    def remembered(self, key: str, routes: Collection[str] | None = None) -> str | None:
        """The fastest route of a key (among ``routes``); None where it (or one of those) has not been measured."""
        times = self._load().get(key) if allowed() else None
        if times is None or (routes is not None and not times.keys() >= set(routes)):
            return None
        return min(routes or times, key=times.__getitem__)

    def best(self, key: str, candidates: Mapping[str, Candidate], timer: Timer) -> str | None:
        """The fastest candidate, or None where it is unknown and nothing may be measured now.

        Candidates have no effect besides their results. One that raises RuntimeError, such as for want of memory,
        counts as infinitely slow in this process, and the key stays out of the file. If all do, the last raises.
        """
        route = self.remembered(key, candidates)
        if route is not None or not may_measure():
            return route
        with self._lock:
            if self.remembered(key, candidates) is None:
                self._store(key, measure(candidates, timer))
            return self.remembered(key, candidates)

    def table(self) -> list[tuple[str, str, Times]]:
        """(key, fastest route, times of all) for printing."""
        return [(key, min(times, key=times.__getitem__), dict(times)) for key, times in sorted(self._load().items())]

    def _load(self) -> dict[str, Times]:
        if self._known is None:
            with self._lock:
                self._known = self._read(warn=True) if self._known is None else self._known
        return self._known

    def _store(self, key: str, times: Times) -> None:
        known = self._load()
        times = known.get(key, {}) | times
        # What other processes have written since goes before ours in the file, but for this key; in memory ours goes
        # first, so that no shape changes its route midway.
        found = self._read(warn=False)
        self._known = found | known | {key: times}
        if self._path is None or math.inf in times.values():
            return
        entries = {k: t for k, t in known.items() if math.inf not in t.values()} | found | {key: times}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(self._path, json.dumps({"header": self._header, "times": entries}, indent=1))
        except OSError as error:
            path, self._path = self._path, None
            _warn(f"{path} cannot be written, so this process alone knows its timings; set PYADAPT_CACHE ({error})")

    def _read(self, *, warn: bool) -> dict[str, Times]:
        if self._path is None or not os.path.exists(self._path):
            return {}
        try:
            content = json.loads(self._path.read_text("utf-8"))
            if content["header"] != self._header:
                raise ValueError(f"it is of {content['header']}, not of {self._header}")
            if not all(times and all(0 <= t < math.inf for t in times.values()) for times in content["times"].values()):
                raise ValueError("it holds impossible times")
            return content["times"]
        except Exception as error:  # a damaged file may fail in any way
            if warn:
                _warn(f"{self._path} is ignored, and replaced at the next measurement: {error!r}")
            return {}


def _warn(text: str) -> None:
    warnings.warn(f"pyadapt's autotuning: {text}", RuntimeWarning, stacklevel=2)


def allowed() -> bool:
    """Whether a choice may depend on measurements at all."""
    return os.environ.get("PYADAPT_AUTOTUNE") != "0" and not torch.are_deterministic_algorithms_enabled()


def may_measure() -> bool:
    """Whether calls may be timed now: nobody compiles, traces, transforms or captures them."""
    return (
        allowed()
        and not is_compiling()
        and not _len_torch_dispatch_stack()  # fake and functional modes among them
        and not _are_functorch_transforms_active()
        and _get_tracing_state() is None
        and not (torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing())
    )


@torch.no_grad()
def measure(candidates: Mapping[str, Candidate], timer: Timer) -> Times:
    """The median time of each candidate, infinite if it fails. They take turns, since clocks drift."""
    samples: dict[str, list[float]] = {route: [] for route in candidates}
    for _ in range(WARM_UP + TURNS):
        for route in list(samples):
            try:
                samples[route].append(timer(candidates[route]))
            except RuntimeError:
                del samples[route]
                if not samples:
                    raise
    medians = {route: round(statistics.median(times[WARM_UP:]), 2) for route, times in samples.items()}
    return dict.fromkeys(candidates, math.inf) | medians


def cuda_timer(device: torch.device, calls: int = 3) -> Timer:
    """The mean of a few calls by CUDA events. From an idle GPU, launches count where they take longer than kernels."""

    def time(candidate: Candidate) -> float:
        with torch.cuda.device(device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.current_stream().synchronize()
            start.record()
            for _ in range(calls):
                candidate()
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop) / calls * 1e3

    return time


@functools.cache
def measurements(device: torch.device) -> Measurements:
    """Those of a CUDA device with an index.

    Equal ones share a file, not a lock: waiting for another's measurement could hold up a collective it waits for.
    """
    gpu, module = torch.cuda.get_device_properties(device), native.cuda()
    build = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:16] if module and module.__file__ else None
    versions = f"build {build}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    machine = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {versions}"
    name = f"{re.sub('[^A-Za-z0-9]+', '-', gpu.name)}-{hashlib.sha256(machine.encode()).hexdigest()[:12]}"
    folder = cache_folder()
    return Measurements(machine, folder and folder / f"autotune-{name}.json")


def cache_folder() -> Path | None:
    """Where measurements are kept; None for a user without a home."""
    if own := os.environ.get("PYADAPT_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyadapt"
    except RuntimeError:
        return None
