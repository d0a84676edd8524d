"""What one process has alive and sends, exactly: every allocation of tensors, as torch's profiler saw it.

Resident memory misleads, since freed blocks stay with malloc, and a tensor that autograd alone holds is an object to
nobody: the allocator's own events see all, whichever library asked. Nothing of an engine's is wrapped or replaced.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from . import transport

_MARK = "pyadapt.scaling/"


@dataclass
class Stage:
    """What went on up to a mark, since the one before.

    Attributes:
        name: of the mark.
        live: bytes of tensors alive at the mark, of those allocated since the recording began.
        peak: the most that were alive at once.
        traffic: kind of collective -> bytes (see `transport.traffic`).
        calls: kind of collective -> how many.
    """

    name: str = ""
    live: int = 0
    peak: int = 0
    traffic: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


class Recorder:
    """Records what this thread allocates, and what the groups of `transport` carry.

    recorder = Recorder()
    with recorder.recording():
        ...
        recorder.mark("forward")
    recorder.last("forward").live
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the block does."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        # Or each mark would look through all that has been imported.
        gc.freeze()
        transport.traffic.clear()
        transport.calls.clear()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        self._read_memory(profiler)

    def mark(self, name: str) -> None:
        """End a stage; what engines have left in reference cycles is not alive."""
        gc.collect()
        with record_function(_MARK + name):
            self.stages.append(Stage(name, traffic=transport.traffic.copy(), calls=transport.calls.copy()))
        transport.traffic.clear()
        transport.calls.clear()

    def last(self, name: str) -> Stage:
        """The last stage of that name."""
        return next(stage for stage in reversed(self.stages) if stage.name == name)

    def _read_memory(self, profiler: Any) -> None:
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        stages = iter(self.stages)
        live = peak = 0
        for event in events:
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
            elif event.name().startswith(_MARK):
                stage = next(stages)
                stage.live, stage.peak = live, peak
                peak = live


def start_group() -> None:
    """The process group that is counted, from what a launcher has put into the environment."""
    transport.register()
    dist.init_process_group(transport.NAME)
