"""The source route: csrc/cuda/<stem>.cu compiled by g++ for the emulator, with its driver, plain and sanitized.

A program is a driver (drivers/<stem>.cpp), linked with the kernels it drives where there are any, for one architecture
in one flavour. Objects are kept in build/emulator/source under a name made from all that they are compiled from.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from source_tree import ROOT, script

CSRC = ROOT / "csrc"
EMULATOR = Path(__file__).resolve().parent
RUNTIME = EMULATOR / "runtime"
DRIVERS = EMULATOR / "drivers"
CACHE = ROOT / "build" / "emulator" / "source"

ARCHITECTURES = (750, 800)
KEPT_DAYS = 7

COMMON = ("-std=c++17", "-Wno-unknown-pragmas")
# -Og, where -O1 takes a compiler twice as long and saves less of the run.
FLAVOURS = {
    "plain": ("-O1",),
    "address": ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}

# A sanitizer's finding does not hang on the order in which fibers ran, so under one a single order is enough; the plain
# flavour runs all three.
ENVIRONMENT = {
    "plain": {},
    "address": {
        "PYADAPT_EMULATOR_CASES": "small",
        "PYADAPT_EMULATOR_ORDER": "random",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "thread": {
        "PYADAPT_EMULATOR_CASES": "small",
        "PYADAPT_EMULATOR_ORDER": "reverse",
        "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
    },
}

# What an output says about why a program failed, the more telling first.
REASONS = (
    ("data race", r"ThreadSanitizer: (data race)"),
    ("thread sanitizer", r"ThreadSanitizer: ([^\n(]*)"),
    ("address sanitizer", r"AddressSanitizer: ([\w-]+)"),
    ("undefined behaviour", r"runtime error: ([^\n]*)"),
    ("emulator", r"emulator: ([^\n]*)"),
    ("bank conflicts", r"bank conflicts: (\d+)"),
    ("wrong value", r"FAIL [^\n]*\n\s*([^\n]*)"),
)


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `reason` is empty where all was right."""

    reason: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the program found nothing wrong, and none of the nets did."""
        return not self.reason


class CompileError(RuntimeError):
    """g++ refused a source; the message is its own."""


@functools.cache
def cuda_include() -> Path | None:
    """The folder of CUDA's headers, or None where no toolkit is installed."""
    toolkit = script("cuda_toolkit")
    try:
        return toolkit.find().include
    except toolkit.ToolMissing:
        return None


@functools.cache
def compiler() -> str | None:
    """The g++ to use: CXX where it is one, else g++; None where there is none."""
    named = os.environ.get("CXX", "")
    return shutil.which(named if "g++" in Path(named).name else "g++")


def why_not() -> str | None:
    """What this machine lacks for the source route, or None."""
    if compiler() is None:
        return "waits for g++"
    if cuda_include() is None:
        return "waits for CUDA's headers: python scripts/cuda_toolkit.py says how to get them"
    return None


def stems() -> list[str]:
    """The kernel families that have a driver."""
    return sorted(path.stem for path in DRIVERS.glob("*.cpp") if (CSRC / "cuda" / f"{path.stem}.cu").exists())


def _system(folder: Path) -> list[str]:
    return ["-isystem", str(folder)]


def _options(flavour: str, architecture: int, csrc: Path) -> list[str]:
    return [
        *COMMON,
        *FLAVOURS[flavour],
        "-DPYADAPT_EMULATOR",
        f"-DPYADAPT_ARCH={architecture}",
        f"-I{RUNTIME}",
        f"-I{DRIVERS}",
        f"-I{csrc}",
        *_system(cuda_include()),
        *_system(cuda_include() / "cccl"),  # CUDA 13 keeps its C++ library there
    ]


def _without_place(options: list[str], csrc: Path) -> list[str]:
    """The same, wherever this csrc lies: a copy of the sources makes the same object."""
    return [option for option in options if option != f"-I{csrc}"]


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, check=True).stdout


def _name(kind: str, files: Sequence[Path], words: Sequence[str]) -> str:
    """A name that changes with any of these files and words."""
    digest = hashlib.sha256()
    for word in (_compiler_version(), *words):
        digest.update(word.encode() + b"\0")
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{kind}-{digest.hexdigest()[:24]}"


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """One process at a time makes what has this name."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(name: str, command: list[str]) -> Path:
    """The file that `command -o` writes, from the cache where it is there."""
    target = CACHE / name
    with _alone(name):
        if not target.exists():
            partial = CACHE / f"{name}.partial"
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
            if done.returncode:
                raise CompileError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
            partial.rename(target)
        target.touch()  # still in use
    return target


@functools.cache
def _forget_old() -> None:
    """Remove what no test has used for some days, once a process."""
    horizon = time.time() - KEPT_DAYS * 86400
    for path in CACHE.glob("*"):
        try:
            if path.is_file() and path.stat().st_mtime < horizon:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            pass


def _headers(csrc: Path) -> list[Path]:
    """What drivers may include: no device code, so that an edit of that leaves their objects as they are."""
    return sorted([*RUNTIME.glob("*.hpp"), *DRIVERS.glob("*.hpp"), *csrc.glob("core/*.hpp"), *csrc.glob("cuda/*.hpp")])


def driver_object(driver: str, flavour: str, architecture: int, csrc: Path = CSRC, more: Sequence[str] = ()) -> Path:
    """drivers/<driver>.cpp, compiled with `more` options than the usual ones."""
    source = DRIVERS / f"{driver}.cpp"
    if re.search(r'#include\s+["<][^">]*\.cuh?[">]', source.read_text()):
        raise CompileError(f"{source.name} includes device code: a driver calls what kernels.hpp declares")
    options = [*_options(flavour, architecture, csrc), *more]
    name = _name(f"driver-{driver}", [source, *_headers(csrc)], _without_place(options, csrc))
    return _make(f"{name}.o", [str(compiler()), *options, "-c", str(source)])


def kernel_object(stem: str, flavour: str, architecture: int, csrc: Path = CSRC) -> Path:
    """csrc/cuda/<stem>.cu, compiled by g++."""
    source = csrc / "cuda" / f"{stem}.cu"
    options = _options(flavour, architecture, csrc)
    files = [source, *sorted(csrc.glob("cuda/*.cuh")), *_headers(csrc)]
    name = _name(f"kernel-{stem}", files, _without_place(options, csrc))
    return _make(f"{name}.o", [str(compiler()), *options, "-x", "c++", "-c", str(source)])


def program(driver: str, flavour: str, architecture: int = 800, csrc: Path = CSRC, more: Sequence[str] = ()) -> Path:
    """The driver, linked with the kernels of its name where there are any. Raises CompileError.

    `more` options are the driver's alone: for one without kernels.
    """
    _forget_old()
    objects = [driver_object(driver, flavour, architecture, csrc, more)]
    if (csrc / "cuda" / f"{driver}.cu").exists():
        objects.append(kernel_object(driver, flavour, architecture, csrc))
    name = _name(f"program-{driver}", objects, FLAVOURS[flavour])
    return _make(name, [str(compiler()), *FLAVOURS[flavour], *map(str, objects)])


def _reason(status: int, output: str) -> str:
    if status == 0:
        return ""
    for what, pattern in REASONS:
        found = re.search(pattern, output)
        if found:
            return f"{what}: {found.group(1)}"
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _run(command: list[str], environment: dict[str, str], timeout: float) -> tuple[int, str] | None:
    """Exit status and output, or None where the time ran out."""
    try:
        done = subprocess.run(
            command, env=environment, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode, done.stdout


def run(
    binary: Path, flavour: str, *arguments: str, timeout: float = 300, stop_at_first: bool = False, **environment: str
) -> Outcome:
    """Run a program to its end; `environment` adds to what its flavour sets."""
    full = {**os.environ, **ENVIRONMENT[flavour], **environment}
    if stop_at_first:
        full["PYADAPT_EMULATOR_FIRST"] = "1"
    start = time.monotonic()
    ended = _run([str(binary), *arguments], full, timeout)
    if ended and "unexpected memory mapping" in ended[1]:
        # An older ThreadSanitizer has no room for so many random bits of address.
        ended = _run(["setarch", "-R", str(binary), *arguments], full, timeout)
    seconds = time.monotonic() - start
    if ended is None:
        return Outcome(f"no end within {timeout:.0f} s", "", seconds)
    return Outcome(_reason(*ended), ended[1], seconds)
