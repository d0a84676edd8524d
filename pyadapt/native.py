"""Finds, loads and describes the native extension ``pyadapt._native``.

It is loaded at first use, not at import. Without it everything still works, through the plain-torch references.

Environment:

- ``PYADAPT_NATIVE=0`` never loads it.
- ``PYADAPT_CPU_ISA=avx2`` (or another of ``isas()``) picks the CPU kernels' instruction set; without it the best one
  that this machine runs is in use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_NAME = "pyadapt._native"


@functools.cache
def core() -> ModuleType | None:
    """The extension module, or None where it is disabled or does not load. Raises on a wrong ``PYADAPT_CPU_ISA``."""
    module = _load()
    if module is not None:
        _apply_requested_isa(module)
    return module


# Cached by itself, so that a failure is warned of once.
@functools.cache
def _load() -> ModuleType | None:
    if os.environ.get("PYADAPT_NATIVE") == "0":
        return None
    try:
        return importlib.import_module(_NAME)
    except ImportError as error:
        warnings.warn(_explain_failure(error), RuntimeWarning, stacklevel=4)
        return None


def _explain_failure(error: ImportError) -> str:
    package = Path(__file__).parent
    wanted = f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    found = sorted(path.name for path in package.glob("_native*"))
    return (
        f"pyadapt's native kernels did not load ({error}); slower plain torch serves instead. "
        f"Looked for {wanted} in {package}; there: {', '.join(found) or 'no such file'}. "
        "Build them with `pip install .`, or set PYADAPT_NATIVE=0 to do without and without this warning."
    )


# Cached, so that a switch by set_isa stays; a wrong name is not cached, and raises at every use.
@functools.cache
def _apply_requested_isa(module: ModuleType) -> None:
    requested = os.environ.get("PYADAPT_CPU_ISA")
    if not requested:
        return
    try:
        module.set_isa(requested)
    except ValueError as error:
        raise ValueError(f"PYADAPT_CPU_ISA: {error}") from None


def available() -> bool:
    """Whether the native kernels are there to use."""
    return core() is not None


def isas() -> tuple[str, ...]:
    """The instruction sets that this build holds and this machine runs, best last, emulated ones behind them."""
    module = core()
    return tuple(module.usable_isas()) if module else ()


@functools.cache
def isa() -> str | None:
    """The instruction set in use; None without native kernels."""
    module = core()
    return module.isa() if module else None


def set_isa(name: str) -> None:
    """Switch every kernel to another of ``isas()``. Not while another thread is inside a kernel."""
    module = core()
    if module is None:
        raise RuntimeError("there is no instruction set to choose: pyadapt's native kernels are not loaded")
    module.set_isa(name)
    isa.cache_clear()


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """``set_isa`` for the length of a with block."""
    before = isa()
    set_isa(name)
    try:
        yield
    finally:
        if before is not None:
            set_isa(before)


def describe() -> dict[str, Any]:
    """What was built and what is in use, for bug reports."""
    module = core()
    if module is None:
        return {"available": False}
    return {
        "available": True,
        "version": module.version,
        "compiler": module.compiler,
        "file": module.__file__,
        "isas": isas(),
        "isa": isa(),
        "openmp": module.openmp,
        "openmp_threads": torch.get_num_threads(),
        "cuda": module.cuda,
    }
