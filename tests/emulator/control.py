"""What a test can tell the emulated device, and ask of it.

`target` is the emulated extension or the path of any library that build.py has made. A setting holds until it is
changed.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ORDERS = ("forward", "reverse", "random")


def set_capability(target: ModuleType | Path, capability: int) -> None:
    """Be an sm_75, sm_80, ... device: it runs the newest translated kernels that it can, as from PTX."""
    library(target).emulator_set_capability(capability)


def set_multiprocessors(target: ModuleType | Path, count: int) -> None:
    """How many multiprocessors the devices say that they have."""
    library(target).emulator_set_multiprocessors(count)


def set_order(target: ModuleType | Path, order: str, seed: int = 1) -> None:
    """In which order threads run: forward, reverse or random."""
    library(target).emulator_set_order(ORDERS.index(order), ctypes.c_ulonglong(seed))


def fail_next_launch(target: ModuleType | Path, error: int) -> None:
    """The next launch gives this cudaError_t and runs nothing."""
    library(target).emulator_fail_next_launch(error)


def last_failure(target: ModuleType | Path) -> str:
    """What went wrong inside a kernel last; empty where nothing has since `reset`."""
    return library(target).emulator_last_failure().decode()


def reset(target: ModuleType | Path) -> None:
    """Forget launches, failures and errors; settings stay."""
    library(target).emulator_reset()


def launches(target: ModuleType | Path) -> list[dict[str, Any]]:
    """The launches since `reset`, oldest first: kernel, grid, block, shared, and how often what happened."""
    return json.loads(library(target).emulator_launches())


def launch(
    target: ModuleType | Path,
    kernel: str,
    arguments: Sequence[ctypes._SimpleCData | ctypes.Structure],
    block: tuple[int, int, int] = (32, 1, 1),
    grid: tuple[int, int, int] = (1, 1, 1),
    shared: int = 0,
) -> int:
    """Run a translated kernel by its PTX name; gives the cudaError_t."""
    pointers = (ctypes.c_void_p * (len(arguments) or 1))(*(ctypes.addressof(a) for a in arguments))
    extent = ctypes.c_uint * 3
    function = library(target).emulator_launch
    return function(kernel.encode(), extent(*grid), extent(*block), pointers, ctypes.c_size_t(shared))


def library(target: ModuleType | Path) -> ctypes.CDLL:
    """The library behind a module or a path; the one that the process has loaded already."""
    path = target.__file__ if isinstance(target, ModuleType) else target
    return _library(str(path))


@functools.cache
def _library(path: str) -> ctypes.CDLL:
    found = ctypes.CDLL(path)
    found.emulator_last_failure.restype = ctypes.c_char_p
    found.emulator_launches.restype = ctypes.c_char_p
    return found
