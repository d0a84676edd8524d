"""What a part of a program takes of memory, on the GPU and in the process: before it, kept by it, at its peak."""

from __future__ import annotations

import threading

import psutil
import torch

MIB = 2**20


class MemoryTrace:
    """`with MemoryTrace() as trace: ...`, then `print(trace.table("training"))`.

    Bytes are what torch has allocated on the GPU, and the resident set of this process on the CPU, whose peak a thread
    watches. Where there is no GPU its row is zeros.
    """

    INTERVAL = 0.01  # seconds between two looks at the resident set; a shorter peak may be missed

    def __enter__(self):
        self._process = psutil.Process()
        self._done = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.before = self._now()
        self._cpu_peak = self.before["CPU"]
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._watcher.join()
        self.after = self._now()
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self.peak = {"GPU": gpu, "CPU": max(self._cpu_peak, self.after["CPU"])}

    def _now(self):
        gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        return {"GPU": gpu, "CPU": self._process.memory_info().rss}

    def _watch(self):
        while not self._done.wait(self.INTERVAL):
            self._cpu_peak = max(self._cpu_peak, self._process.memory_info().rss)

    def table(self, stage):
        """In MiB, each device's: before; consumed, end less before; peak, less before; total, the peak itself."""
        lines = [f"{f'memory, {stage} (MiB)':<28}{'before':>10}{'consumed':>10}{'peak':>10}{'total':>10}"]
        for device, before in self.before.items():
            figures = (before, self.after[device] - before, self.peak[device] - before, self.peak[device])
            lines.append(f"  {device:<26}" + "".join(f"{figure / MIB:>10.0f}" for figure in figures))
        return "\n".join(lines)
