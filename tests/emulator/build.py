"""pyadapt._cuda for a machine without a GPU: nvcc's own host code, with kernels translated from nvcc's own PTX.

Each csrc/cuda/*.cu goes through nvcc once, which leaves the host object and the PTX of ARCHITECTURES; the PTX becomes
C++ (ptx/) and that an object on the fiber runtime (runtime/); all of it is linked with the extension's C++ and a
stand-in for the CUDA runtime (runtime/cudart.cpp). Objects are kept by the hash of everything they are made from, for
DAYS_KEPT after their last use.

    python tests/emulator/build.py     builds, and prints where
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "tests" / "emulator" / "runtime"
ARCHITECTURES = (75, 80)
OUT = ROOT / "build" / "emulator"
JOBS = 2
DAYS_KEPT = 3

sys.path[:0] = [p for p in (str(ROOT / "tests"), str(ROOT / "scripts")) if p not in sys.path]

import cuda_toolkit  # noqa: E402
from emulator.ptx import translate  # noqa: E402

CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
# PTX wraps integers, reads memory as any type, and fuses a multiplication with an addition only where it says so. Of
# what a translator writes, warnings about unused names say nothing.
TRANSLATED_FLAGS = [*CXX_FLAGS, "-O1", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]


class BuildError(RuntimeError):
    """A compiler refused; the message holds its command and its words."""


@dataclass
class Recipe:
    """What a shared library is made from, beside the stand-in runtime."""

    name: str  # of the file
    kernels: Sequence[Path]  # .cu, or .ptx that is only translated
    sources: Sequence[Path] = ()
    includes: Sequence[Path] = ()
    definitions: dict[str, str] = field(default_factory=dict)


def extension() -> Recipe:
    """The recipe of the whole extension."""
    import pybind11

    csrc = ROOT / "csrc"
    return Recipe(
        name="_cuda" + sysconfig.get_config_var("EXT_SUFFIX"),
        kernels=sorted(csrc.glob("cuda/*.cu")),
        sources=sorted([*csrc.glob("cuda/*.cpp"), *csrc.glob("core/*.cpp"), *csrc.glob("python/*.cpp")]),
        includes=[Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])],
        definitions={
            "PYADAPT_VERSION": '"emulated"',
            "PYADAPT_CUDA_ARCHITECTURES": json.dumps(",".join(f"{a}-virtual" for a in ARCHITECTURES)),
        },
    )


def build(out: Path = OUT, recipe: Recipe | None = None) -> Path:
    """Build what has changed since the last time, and return the library.

    Processes that build the same library at the same time wait for each other. Raises BuildError, PtxError or
    cuda_toolkit.ToolMissing.
    """
    recipe = recipe or extension()
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out / f"{recipe.name}.lock"), concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        return _Build(out, recipe, pool).run()


@functools.cache
def load() -> ModuleType:
    """The emulated extension, imported under the name that its initialiser has: `_cuda`."""
    path = str(build())
    loader = importlib.machinery.ExtensionFileLoader("_cuda", path)
    spec = importlib.util.spec_from_file_location("_cuda", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class _Build:
    """One run over a recipe. Futures of the pool give the paths of objects."""

    def __init__(self, out: Path, recipe: Recipe, pool: concurrent.futures.Executor):
        self.out, self.recipe, self.pool = out, recipe, pool
        self.toolkit = cuda_toolkit.find()
        self.cxx = os.environ.get("CXX", "g++")
        self.objects = out / "objects"
        self.objects.mkdir(exist_ok=True)

    def run(self) -> Path:
        recipe = self.recipe
        includes = [f"-I{path}" for path in (*recipe.includes, self.toolkit.include)]
        definitions = [f"-D{name}={value}" for name, value in recipe.definitions.items()]
        host_flags = [*CXX_FLAGS, "-O2", *definitions, *includes]
        parts = [self.pool.submit(self._cxx, path, host_flags) for path in (*recipe.sources, RUNTIME / "cudart.cpp")]
        # A thread of the pool must not wait for another: what nvcc leaves is waited for here.
        cuda = [path for path in recipe.kernels if path.suffix == ".cu"]
        compiled = [self.pool.submit(self._nvcc, path) for path in cuda]
        parts += [self.pool.submit(self._translated, p, p.stem) for p in recipe.kernels if p.suffix == ".ptx"]
        host_objects = []
        for path, future in zip(cuda, compiled, strict=True):
            host, *ptx = future.result()
            host_objects.append(host)
            parts += [
                self.pool.submit(self._translated, file, f"{path.stem}-sm{architecture}")
                for architecture, file in zip(ARCHITECTURES, ptx, strict=True)
            ]
        objects = [*host_objects, *(future.result() for future in parts)]
        return self._link(objects)

    def _nvcc(self, source: Path) -> list[Path]:
        """The host object of a .cu file and its PTX for each architecture, from one run of nvcc.

        One run, because kernels without external linkage get a name of their own in each.
        """
        flags = ["-std=c++17", "-O2", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ARCHITECTURES]
        key = self._key(f"nvcc {self.toolkit.version} {flags} {self._cxx_version}", source, [])
        ends = (".host.o", *(f".{a}.ptx" for a in ARCHITECTURES))
        outputs = [self.objects / f"{source.stem}-{key}{end}" for end in ends]
        if all(_used(path) for path in outputs):
            return outputs
        with tempfile.TemporaryDirectory(dir=self.out) as scratch:
            made = [Path(scratch, "host.o"), *(Path(scratch, f"{source.stem}.compute_{a}.ptx") for a in ARCHITECTURES)]
            keep = ["--keep", "--keep-dir", scratch]
            _run([self.toolkit.nvcc, "-ccbin", self.cxx, *flags, *keep, "-c", source, "-o", made[0]], cwd=scratch)
            for source_path, path in zip(made, outputs, strict=True):
                os.replace(source_path, path)
        return outputs

    def _translated(self, ptx: Path, name: str) -> Path:
        """The object of the C++ that a file of PTX becomes."""
        digest = hashlib.sha256(ptx.read_bytes())
        for part in sorted((ROOT / "tests" / "emulator" / "ptx").glob("*.py")):
            digest.update(part.read_bytes())
        code = self.objects / f"{name}-{digest.hexdigest()[:16]}.cpp"
        if not _used(code):
            _write(code, translate(ptx.read_text()))
        return self._cxx(code, [*TRANSLATED_FLAGS, f"-I{RUNTIME}"], name)

    def _cxx(self, source: Path, flags: list[str], name: str = "") -> Path:
        """The object of a C++ file."""
        key = self._key(f"{self._cxx_version} {flags}", source, [RUNTIME])
        path = self.objects / f"{name or source.stem}-{key}.o"
        if not _used(path):
            with tempfile.TemporaryDirectory(dir=self.out) as scratch:
                made = Path(scratch, "object.o")
                _run([self.cxx, *flags, "-c", source, "-o", made])
                os.replace(made, path)
        return path

    def _link(self, objects: list[Path]) -> Path:
        digest = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()[:16]
        path = self.out / digest / self.recipe.name
        if not _used(path):
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.out) as scratch:
                made = Path(scratch, "library.so")
                # Symbolic: another CUDA runtime in the process, such as torch's, must not be taken for this one.
                _run([self.cxx, "-shared", "-Wl,-Bsymbolic", "-o", made, *objects])
                os.replace(made, path)
        self._forget_old()
        return path

    def _forget_old(self) -> None:
        """Delete what no build has used for a while."""
        oldest = time.time() - DAYS_KEPT * 24 * 3600
        for path in (*self.objects.iterdir(), *self.out.glob("*/*.so")):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    @functools.cached_property
    def _cxx_version(self) -> str:
        done = subprocess.run([self.cxx, "--version"], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0]

    def _key(self, how: str, source: Path, folders: Sequence[Path]) -> str:
        """A hash of the command, of a file and of every file of this project that it includes."""
        digest = hashlib.sha256(how.encode() + source.read_bytes())
        for path in sorted(_closure(source, folders) - {source.resolve()}):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]


def _closure(source: Path, folders: Sequence[Path]) -> set[Path]:
    """A file and what it includes by `#include "..."`, from its own folder or from these."""
    found: set[Path] = set()
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
            candidates = [folder / name for folder in (path.parent, *folders)]
            waiting += [c.resolve() for c in candidates if c.exists()][:1]
    return found


def _used(path: Path) -> bool:
    """Whether a file is there; its time says when it was last wanted."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _run(command: Sequence[str | Path], cwd: str | None = None) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(build())
