"""Finds, loads and describes the native extensions: ``pyadapt._native`` (CPU) and ``pyadapt._cuda``.

They are loaded at first use, not at import. Without them everything still works, through the plain-torch references.

Environment:

- ``PYADAPT_NATIVE=0`` never loads them.
- ``PYADAPT_CPU_ISA=avx2`` (or another of ``isas()``) picks the CPU kernels' instruction set; without it the best one
  that this machine runs is in use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_NAME, _CUDA_NAME = "pyadapt._native", "pyadapt._cuda"


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


# --- CUDA ---

# A build of the CUDA module that works on CPU tensors, while `emulating_cuda`: the tests' stand-in for a GPU.
_emulated: ModuleType | None = None


def cuda() -> ModuleType | None:
    """The CUDA extension module; None where there is no CUDA device, or where it is not built or disabled."""
    return _emulated or _load_cuda()


@functools.cache
def _load_cuda() -> ModuleType | None:
    if os.environ.get("PYADAPT_NATIVE") == "0" or not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    try:
        return importlib.import_module(_CUDA_NAME)
    except ImportError as error:
        warnings.warn(
            f"pyadapt's CUDA kernels did not load ({error}); slower torch code serves CUDA tensors instead. Build them "
            "with `PYADAPT_CUDA=on pip install .` (it needs nvcc), or set PYADAPT_NATIVE=0 to do without.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None


def device_kind(tensor: Tensor) -> str:
    """Whose kernels work on a tensor: its device type, or "cuda" for every CPU tensor while CUDA is emulated."""
    if tensor.is_cpu:
        return "cpu" if _emulated is None else "cuda"
    return tensor.device.type


def cuda_isa(device: int = 0) -> str | None:
    """What the CUDA kernels run as on a device ("sm_90"); None where they do not."""
    module = cuda()
    if module is None:
        return None
    if _emulated is not None:
        return f"sm_{module.capability(device)}"
    return _cuda_isa(device)


@functools.cache
def _cuda_isa(device: int) -> str | None:
    module = cuda()
    assert module is not None
    capability = module.capability(device)
    if architectures_serve(module.architectures, capability):
        return f"sm_{capability}"
    warnings.warn(
        f"pyadapt's CUDA kernels were built for {module.architectures}, which does not serve cuda:{device} "
        f"({torch.cuda.get_device_name(device)}, sm_{capability}); slower torch code serves it instead. Build them for "
        f"it: PYADAPT_CUDA=on pip install . --config-settings=cmake.define.PYADAPT_CUDA_ARCHITECTURES={capability}",
        RuntimeWarning,
        stacklevel=4,
    )
    return None


def architectures_serve(architectures: str, capability: int) -> bool:
    """Whether a build for these (CMake's names, by commas) runs on a device: its own code, or PTX to compile.

    Code of sm_80 runs on every sm_8x from there on; PTX of compute_80 on everything from there on.
    """
    for name in architectures.split(","):
        number, _, kind = name.partition("-")
        built = int(number.rstrip("af"))
        own = kind != "virtual" and built // 10 == capability // 10 and built <= capability
        if own or (kind != "real" and built <= capability):
            return True
    return False


@contextmanager
def emulating_cuda(module: ModuleType) -> Iterator[None]:
    """Serve CPU tensors by a build of the CUDA module that works on host memory, for the length of a with block."""
    global _emulated
    before, _emulated = _emulated, module
    try:
        yield
    finally:
        _emulated = before


def describe() -> dict[str, Any]:
    """What was built and what is in use, for bug reports."""
    return {**_describe_cpu(), **_describe_cuda()}


def _describe_cuda() -> dict[str, Any]:
    module = cuda()
    if module is None:
        built = importlib.util.find_spec(_CUDA_NAME) is not None
        return {"cuda": "built, but torch sees no CUDA device" if built else "not built"}
    return {
        "cuda": "in use",
        "cuda_file": module.__file__,
        "cuda_architectures": module.architectures.split(","),
        "cuda_runtime": module.runtime,
        "cuda_devices": [cuda_isa(device) or "not served" for device in range(module.device_count())],
    }


def _describe_cpu() -> dict[str, Any]:
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
    }
