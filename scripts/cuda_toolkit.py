"""Where CUDA's compiler and its companions are: ``python scripts/cuda_toolkit.py [nvcc|include|library|...]``.

nvcc is looked for in CUDACXX, CUDA_HOME, CUDA_PATH, on PATH, in /usr/local/cuda, and at last in the running
environment's PyPI packages (tests/cuda-requirements.txt): with those a bare machine that has pip and a host compiler
builds everything.
cuobjdump and nvdisasm, which a runtime-only toolkit lacks, come from beside nvcc, from PATH or from PyPI likewise; both
read objects of an older toolkit.

``python scripts/cuda_toolkit.py cmake`` prints the arguments that cmake's CUDA language needs: none beside the compiler
where the toolkit has the usual folders; the packages keep their libraries in lib/ and no libcudart.so, which has to be
said. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# The packages, with matching versions. None needs what it says it depends on.
REQUIREMENTS = Path(__file__).parents[1] / "tests" / "cuda-requirements.txt"
INSTALL = f"pip install --no-deps -r {REQUIREMENTS}"

USUAL = Path("/usr/local/cuda")


class ToolMissing(RuntimeError):
    """A tool of CUDA is nowhere; the message says where it was looked for and how to get it."""


@dataclass(frozen=True)
class Toolkit:
    """One installation of nvcc."""

    nvcc: Path
    root: Path
    include: Path
    library: Path  # the folder of libcudart_static.a

    @functools.cached_property
    def version(self) -> str:
        """Such as 13.0.88."""
        return version_of(self.nvcc)

    @property
    def link_options(self) -> list[str]:
        """What nvcc needs, beside its own idea of where libraries are, to link an executable or a shared library."""
        return [f"-L{self.library}"]

    @property
    def cmake_arguments(self) -> list[str]:
        """The -D options for a project with cmake's CUDA language and find_package(CUDAToolkit)."""
        arguments = [f"-DCMAKE_CUDA_COMPILER={self.nvcc}", f"-DCUDAToolkit_ROOT={self.root}"]
        if not (self.library / "libcudart.so").exists():
            shared = sorted(self.library.glob("libcudart.so.*"))
            arguments.append(f"-DCMAKE_CUDA_FLAGS=-L{self.library}")
            arguments += [f"-DCUDA_CUDART={path}" for path in shared[-1:]]
        return arguments


def wheel_roots() -> list[Path]:
    """The folders that hold CUDA's PyPI packages in this environment, newest CUDA first."""
    found = [root for entry in sys.path if entry for root in Path(entry).glob("nvidia/cu[0-9]*") if root.is_dir()]
    return sorted(dict.fromkeys(found), key=lambda root: int(re.sub(r"\D", "", root.name) or 0), reverse=True)


def _executable(path: str | Path) -> Path | None:
    found = shutil.which(str(path))
    return Path(found) if found else None


def _nvcc_candidates() -> list[str | Path]:
    candidates: list[str | Path] = [os.environ.get("CUDACXX", "")]
    candidates += [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += ["nvcc", USUAL / "bin" / "nvcc"]
    candidates += [root / "bin" / "nvcc" for root in wheel_roots()]
    return [candidate for candidate in candidates if candidate]


def _root_of(nvcc: Path) -> Path | None:
    """Where this nvcc takes its headers from: it may be a link, or a script that starts another."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.*)$", done.stdout + done.stderr, re.M)
    return Path(found.group(1)).resolve() if found else None


def _first_folder(candidates: list[Path], holds: str) -> Path | None:
    return next((folder for folder in candidates if (folder / holds).exists()), None)


@functools.cache
def find() -> Toolkit:
    """The toolkit to build with. Raises ToolMissing."""
    incomplete = []
    for candidate in _nvcc_candidates():
        nvcc = _executable(candidate)
        root = nvcc and _root_of(nvcc)
        if nvcc is None or root is None:
            continue
        machine = f"{os.uname().machine}-linux"
        roots = [root, root / "targets" / machine.replace("aarch64", "sbsa")]
        include = _first_folder([folder / "include" for folder in roots], "cuda_runtime_api.h")
        library = _first_folder([folder / lib for folder in roots for lib in ("lib64", "lib")], "libcudart_static.a")
        if include is not None and library is not None:
            return Toolkit(nvcc, root, include, library)
        incomplete.append(f"{nvcc} (no {'cuda_runtime_api.h' if include is None else 'libcudart_static.a'} in {root})")
    raise ToolMissing(
        "no CUDA compiler: looked for nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and this "
        f"environment's packages{'; incomplete: ' + ', '.join(incomplete) if incomplete else ''}. "
        f"Without a toolkit: {INSTALL}"
    )


@functools.cache
def tool(name: str) -> Path:
    """cuobjdump, nvdisasm and the like. Raises ToolMissing."""
    folders = [root / "bin" for root in wheel_roots()]
    with contextlib.suppress(ToolMissing):
        folders.insert(0, find().root / "bin")
    for candidate in (name, *(folder / name for folder in folders)):
        found = _executable(candidate)
        if found is not None:
            return found
    raise ToolMissing(f"no {name}: looked on PATH, beside nvcc and in this environment's packages. {INSTALL}")


def version_of(executable: Path) -> str:
    """What a tool of CUDA says its version is, such as 13.0.88."""
    done = subprocess.run([executable, "--version"], capture_output=True, text=True)
    found = re.search(r"\bV(\d+(?:\.\d+)+)", done.stdout)
    return found.group(1) if found else "unknown"


def answers() -> dict[str, str]:
    """Everything that the command line can be asked, by name; what is missing says so."""
    result: dict[str, str] = {}
    try:
        toolkit = find()
    except ToolMissing as error:
        result["nvcc"] = str(error)
    else:
        result |= {
            "nvcc": str(toolkit.nvcc),
            "version": toolkit.version,
            "root": str(toolkit.root),
            "include": str(toolkit.include),
            "library": str(toolkit.library),
            "cmake": " ".join(toolkit.cmake_arguments),
        }
    for name in ("cuobjdump", "nvdisasm"):
        try:
            result[name] = str(tool(name))
        except ToolMissing as error:
            result[name] = str(error)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Print one answer, or all of them; 1 where what was asked for is missing."""
    names = ("nvcc", "version", "root", "include", "library", "cmake", "cuobjdump", "nvdisasm")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="?", choices=names, help="print this alone")
    what = parser.parse_args(arguments).what
    found = answers()
    if what is None:
        for name, answer in found.items():
            print(f"{name:10} {answer}")
        return 0
    try:
        if what in ("cuobjdump", "nvdisasm"):
            tool(what)
        else:
            find()
    except ToolMissing as error:
        print(error, file=sys.stderr)
        return 1
    print(found[what])
    return 0


if __name__ == "__main__":
    sys.exit(main())
