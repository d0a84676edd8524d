"""Which of several routes is the fastest on this GPU: measured once a shape, remembered in a file.

Whether a native kernel or torch's GEMM serves a shape best depends on the GPU and on torch's build more than a rule can
say. The first call of a shape therefore times both; later calls, and later processes, find the answer in the cache
folder: ``PYADAPT_CACHE``, else ``$XDG_CACHE_HOME/pyadapt``, else ``~/.cache/pyadapt``.

Two routes round differently, so measuring makes the last bits of a result depend on the machine, and on what else it
did during the measurement. With ``PYADAPT_AUTOTUNE=0`` (``1`` is the default), and while
``torch.use_deterministic_algorithms`` is on, nothing is measured and nothing remembered is used: the static rule of
``routes.py`` decides, from dtypes and sizes alone.
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
from typing import Any, NamedTuple

import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from pyadapt import files, native

FORMAT = 1
# Turns of all candidates: some to warm up, then those that count, of which the median is taken.
WARM_UP, TURNS = 1, 5

Candidate = Callable[[], object]
Timer = Callable[[Candidate], float]
Times = dict[str, float]


class Key(NamedTuple):
    """What calls must have in common to share a measurement."""

    op: str  # "forward" or "backward"
    x: str  # dtype
    weight: str  # dtype
    weight_rows: bool  # whether W has unit stride along K
    M: int  # the next power of two: ragged token counts share an entry
    N: int
    K: int
    r: int  # the next multiple of 16
    dropout: bool

    @classmethod
    def of(
        cls,
        op: str,
        x: torch.dtype,
        weight: torch.dtype,
        weight_rows: bool,
        M: int,
        N: int,
        K: int,
        r: int,
        dropout: bool,
    ) -> Key:
        """The key of a call with these dtypes and sizes."""
        names = (str(dtype).removeprefix("torch.") for dtype in (x, weight))
        return cls(op, *names, weight_rows, 1 << max(M - 1, 0).bit_length(), N, K, -(-r // 16) * 16, dropout)


_KEY_TYPES = [str, str, str, bool, int, int, int, int, bool]


class Measurements:
    """Median times in microseconds by key and route, in memory and in a file.

    Args:
        machine: all that the times depend on; a file of another machine is ignored and, in time, replaced.
        path: the file; None: in memory only.
    """

    def __init__(self, machine: Mapping[str, str], path: Path | None) -> None:
        self._machine, self._path = dict(machine), path
        self._times: dict[Key, Times] | None = None  # None: the file has not been read yet
        self._lock = threading.RLock()

    def remembered(self, key: Key, routes: Collection[str] | None = None) -> str | None:
        """The fastest route of a key (among ``routes``), or None where it (or one of those) has not been measured."""
        if not allowed():
            return None
        times = self._known().get(key)
        if times is None or (routes is not None and any(route not in times for route in routes)):
            return None
        return min(routes or times, key=times.__getitem__)

    def best(self, key: Key, candidates: Mapping[str, Candidate], timer: Timer) -> str | None:
        """The fastest of the candidates, which are measured if they have not been.

        A candidate must have no effect besides its result. One that raises a ``RuntimeError``, such as running out of
        memory, counts as infinitely slow in this process, and the file is left without this key.

        Returns:
            A name, or None where the static rule must decide, because nothing may be measured or remembered now.

        Raises:
            RuntimeError: every candidate failed; this is the error of the last.
        """
        route = self.remembered(key, candidates)
        if route is not None or not may_measure():
            return route
        with self._lock:
            if self.remembered(key, candidates) is None:
                self._store(key, measure(candidates, timer))
            return self.remembered(key, candidates)

    def table(self) -> list[tuple[Key, str, Times]]:
        """(key, fastest route, microseconds of each route) of all that is known, for printing."""
        return [(key, min(times, key=times.__getitem__), dict(times)) for key, times in sorted(self._known().items())]

    def _known(self) -> dict[Key, Times]:
        if self._times is None:
            with self._lock:
                if self._times is None:
                    self._times = self._read(warn=True)
        return self._times

    def _store(self, key: Key, times: Times) -> None:
        # A copy takes the place of the dict, which other threads read without the lock.
        known = dict(self._known())
        known[key] = known.get(key, {}) | times
        self._times = known
        if self._path is None or math.inf in known[key].values():
            return
        # Another process may have written since: its entries are newer than ours but for this one. In memory ours stay,
        # so that a shape does not change its route midway.
        found = self._read(warn=False)
        ours = {k: v for k, v in known.items() if math.inf not in v.values()}
        self._times = found | known
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(self._path, self._text(ours | found | {key: known[key]}))
        except OSError as error:
            path, self._path = self._path, None
            _warn(f"{path} cannot be written ({error}): timings are kept for this process only. Set PYADAPT_CACHE")

    def _text(self, known: Mapping[Key, Times]) -> str:
        entries = [key._asdict() | {"microseconds": times} for key, times in sorted(known.items())]
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        return f'{{"format": {FORMAT}, "machine": {json.dumps(self._machine)}, "entries": [\n{lines}\n]}}\n'

    def _read(self, *, warn: bool) -> dict[Key, Times]:
        try:
            content = json.loads(self._path.read_text("utf-8")) if self._path else {"entries": []}
            if self._path and (content["format"], content["machine"]) != (FORMAT, self._machine):
                raise ValueError("it is of another format or machine")
            return dict(_parse(entry) for entry in content["entries"])
        except FileNotFoundError:
            return {}
        except Exception as error:  # whatever a damaged file makes of itself
            if warn:
                _warn(f"{self._path} is ignored, and replaced when something is measured: {error!r}")
            return {}


def _parse(entry: dict[str, Any]) -> tuple[Key, Times]:
    times = {route: float(time) for route, time in entry.pop("microseconds").items()}
    key = Key(**entry)
    if [type(value) for value in key] != _KEY_TYPES or not times or not all(0 <= t < math.inf for t in times.values()):
        raise ValueError(f"it holds {key} with times {times}")
    return key, times


def _warn(text: str) -> None:
    warnings.warn(f"pyadapt's autotuning: {text}", RuntimeWarning, stacklevel=2)


# --- measuring ---


@functools.cache
def _switched_on() -> bool:
    value = os.environ.get("PYADAPT_AUTOTUNE") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"PYADAPT_AUTOTUNE is {value!r}; it must be 0 or 1")
    return value == "1"


def allowed() -> bool:
    """Whether a choice may depend on measurements at all."""
    return _switched_on() and not torch.are_deterministic_algorithms_enabled()


def may_measure() -> bool:
    """Whether calls may be timed now: none is compiled, traced, transformed or captured into a CUDA graph."""
    return (
        allowed()
        and not is_compiling()
        and not _len_torch_dispatch_stack()  # fake, functional and tracing modes among them
        and not _are_functorch_transforms_active()
        and _get_tracing_state() is None
        and not (torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing())
    )


@torch.no_grad()
def measure(candidates: Mapping[str, Candidate], timer: Timer) -> Times:
    """The median time of each candidate, infinite for one that fails; they take turns, as clocks drift."""
    samples: dict[str, list[float]] = {route: [] for route in candidates}
    for turn in range(WARM_UP + TURNS):
        for route in list(samples):
            try:
                time = timer(candidates[route])
            except RuntimeError:
                del samples[route]
                if not samples:
                    raise
                continue
            if turn >= WARM_UP:
                samples[route].append(time)
    return {
        route: round(statistics.median(samples[route]), 2) if route in samples else math.inf for route in candidates
    }


def cuda_timer(device: torch.device, calls: int = 3) -> Timer:
    """A timer by CUDA events: the mean of a few calls, each with a cold L2 cache, as W is in a model of many layers."""

    def time(candidate: Candidate) -> float:
        with torch.cuda.device(device):
            cache = 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 25)
            try:
                filler = torch.empty(cache, dtype=torch.uint8, device=device)
            except torch.cuda.OutOfMemoryError:
                filler = torch.empty(0, dtype=torch.uint8, device=device)
            events = []
            for _ in range(calls):
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                filler.zero_()  # this also lets the host get ahead, so that its own time is not counted
                start.record()
                candidate()
                stop.record()
                events.append((start, stop))
            torch.cuda.current_stream().synchronize()
            return sum(start.elapsed_time(stop) for start, stop in events) / calls * 1e3

    return time


# --- where ---


@functools.cache
def measurements(device: torch.device) -> Measurements:
    """Those of a CUDA device (with an index).

    Each device has its own, though equal ones share a file: a thread must not wait for another device's measurement,
    which may itself wait for that thread in a collective.
    """
    properties = torch.cuda.get_device_properties(device)
    machine = {
        "device": str(properties.name),
        "capability": f"{properties.major}.{properties.minor}",
        "build": _build(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
    }
    digest = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:12]
    folder = cache_folder()
    name = f"autotune-{re.sub('[^A-Za-z0-9]+', '-', machine['device'])}-{digest}.json"
    return Measurements(machine, folder / name if folder else None)


@functools.cache
def _build() -> str:
    """Tells one build of the extension from another."""
    module = native.core()
    if module is None or module.__file__ is None:
        return "none"
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:16]


def cache_folder() -> Path | None:
    """Where measurements are kept; None for a user without a home, who has set none either."""
    if own := os.environ.get("PYADAPT_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "pyadapt"
    try:
        return Path.home() / ".cache" / "pyadapt"
    except RuntimeError:
        return None
