"""Builds primitives.cu for hardware or for the emulator, and runs its kernels on numpy arrays."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from source_tree import ROOT, script

SOURCE = Path(__file__).with_name("primitives.cu")
RUNTIME = ROOT / "tests" / "emulator" / "runtime"

# The order of run_primitive's table, and what a lane writes.
WORDS = {
    "product_f16": 4,
    "product_bf16": 4,
    "product_tf32": 4,
    "rounding": 1,
    "matrices": 4,
    "matrices_transposed": 4,
    "copies": 8,
    "exchanges": 12,
    "random_numbers": 9,
    "conversions": 7,
    "arithmetic": 8,
}
LANES = 32
POISON = 0x7FC0BEEF  # a NaN, in every word that a kernel does not write

Array = NDArray[np.generic]
Run = Callable[..., NDArray[np.uint32]]


class LaunchFailed(RuntimeError):
    """The launch or the kernel gave a CUDA error."""


def build_emulated(architecture: int, folder: Path) -> Path:
    """The library for the emulator, as if for compute capability ``architecture`` / 10."""
    library = folder / f"primitives_{architecture}.so"
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-std=c++17", "-O1", "-w", "-x", "c++", SOURCE]
    command += ["-DPYADAPT_EMULATOR", f"-DPYADAPT_ARCH={architecture}", f"-I{RUNTIME}", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", script("cuda_toolkit").find().include, *_cccl(), "-o", library]
    _run(command)
    return library


def build_hardware(capability: int, folder: Path) -> Path:
    """The library for a GPU, such as 90."""
    toolkit = script("cuda_toolkit").find()
    library = folder / f"primitives_sm{capability}.so"
    command = [toolkit.nvcc, "-shared", "-Xcompiler", "-fPIC", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", SOURCE]
    command += [f"-gencode=arch=compute_{capability},code=sm_{capability}", *toolkit.link_options, "-o", library]
    _run(command)
    return library


def _cccl() -> list[str]:
    """cuda_fp16.h includes <nv/target>, which the toolkit keeps in a folder of its own since CUDA 13."""
    folder = script("cuda_toolkit").find().include / "cccl"
    return ["-isystem", str(folder)] if folder.is_dir() else []


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def _function(library: Path) -> Callable[..., int]:
    function = ctypes.CDLL(str(library)).run_primitive
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def _checked(status: int, name: str) -> None:
    if status:
        raise LaunchFailed(f"{name}: CUDA error {status}")


def _operands(operands: tuple[Array, ...]) -> list[Array]:
    """Three arrays, without gaps; an absent one is a single zero."""
    given = [np.ascontiguousarray(operand) for operand in operands]
    return given + [np.zeros(1, np.uint32)] * (3 - len(given))


def emulated(library: Path) -> Run:
    """Kernels by name on the emulator: run(name, cases, first, second, third) -> (cases, 32, words)."""
    function = _function(library)

    def run(name: str, cases: int, *operands: Array) -> NDArray[np.uint32]:
        given = _operands(operands)
        out = np.full((cases, LANES, WORDS[name]), POISON, np.uint32)
        _checked(function(list(WORDS).index(name), *[o.ctypes.data for o in given], out.ctypes.data, cases), name)
        return out

    return run


def on_hardware(library: Path) -> Run:
    """The same on the current CUDA device."""
    import torch

    function = _function(library)

    def run(name: str, cases: int, *operands: Array) -> NDArray[np.uint32]:
        given = [torch.from_numpy(o.view(np.uint8).reshape(-1).copy()).cuda() for o in _operands(operands)]
        poison = np.full((cases, LANES, WORDS[name]), POISON, np.uint32)
        out = torch.from_numpy(poison.view(np.uint8).reshape(-1)).cuda()
        torch.cuda.synchronize()
        _checked(function(list(WORDS).index(name), *[o.data_ptr() for o in given], out.data_ptr(), cases), name)
        torch.cuda.synchronize()  # raises where the kernel failed
        return out.cpu().numpy().view(np.uint32).reshape(poison.shape)

    return run


@functools.cache
def emulator(architecture: int) -> Run:
    """The emulated primitives of one architecture, built once a process."""
    with tempfile.TemporaryDirectory() as folder:
        return emulated(build_emulated(architecture, Path(folder)))


@functools.cache
def hardware() -> Run | None:
    """The primitives on this machine's GPU, built once a process; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        return on_hardware(build_hardware(10 * major + minor, Path(folder)))
