"""Compiles CUDA sources for every release architecture, and reads what the compiler made of each kernel.

A source's object is kept under build/cuda-static by the hash of everything that went into it, with a summary of its
machine code beside it, so that a second look costs nothing; processes that want the same object wait for each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import cuda_toolkit

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "cuda-static"
SOURCES = ROOT / "csrc" / "cuda"

# What a release is built for: machine code of these, and PTX of the newest for what comes after.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PTX = 120
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xptxas=-v", f"-I{ROOT / 'csrc'}")
SUMMARY_FORMAT = 2  # counts in the hash: change it with what a summary holds


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    name: str  # demangled where c++filt is there
    architecture: int
    registers: int
    stack_frame: int  # bytes
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    opcodes: dict[str, int]  # SASS mnemonics with their modifiers, and how often each occurs

    def count(self, prefix: str) -> int:
        """How many instructions are this one: a mnemonic, or one with its first modifiers, such as HMMA.16816."""
        return sum(n for opcode, n in self.opcodes.items() if opcode == prefix or opcode.startswith(prefix + "."))


@dataclass(frozen=True)
class Summary:
    """What one object file or library holds."""

    file: str
    machine_code: tuple[int, ...]
    ptx: tuple[int, ...]
    kernels: tuple[Kernel, ...]


def code_options(architectures: Iterable[int] = ARCHITECTURES, ptx: int | None = PTX) -> list[str]:
    """nvcc's -gencode options."""
    options = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return options + ([f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx is not None else [])


def _run(command: list[str | Path]) -> str:
    """What a command prints to stdout and stderr; its failure is the caller's, with that text."""
    path = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])  # cuobjdump starts nvdisasm
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def listed_architectures(file: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(machine code, PTX) that a file holds."""
    cuobjdump = cuda_toolkit.tool("cuobjdump")

    def listed(option: str) -> tuple[int, ...]:
        done = subprocess.run([cuobjdump, option, file], capture_output=True, text=True)  # fails where there is none
        return tuple(sorted({int(a) for a in re.findall(r"\bsm_(\d+)", done.stdout)}))

    return listed("--list-elf"), listed("--list-ptx")


def resources(log: str) -> dict[tuple[str, int], dict[str, int]]:
    """By (mangled kernel, architecture): what ptxas -v says it uses."""
    found: dict[tuple[str, int], dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)\w?'", line):
            current = found.setdefault((entry.group(1), int(entry.group(2))), {})
        elif spilled := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # A kernel that calls a function has the function's lines below its own: the worst of them counts.
            for name, value in zip(("stack_frame", "spill_stores", "spill_loads"), spilled.groups(), strict=True):
                current[name] = max(current.get(name, 0), int(value))
        elif used := re.search(r"Used (\d+) registers", line):
            current["registers"] = max(current.get("registers", 0), int(used.group(1)))
    return found


def opcodes(listing: str) -> Iterator[tuple[str, int, Counter[str]]]:
    """(mangled kernel, architecture, its opcodes) of a cuobjdump --dump-sass listing."""
    architecture, name, counts = 0, "", Counter[str]()
    for line in listing.splitlines():
        if header := re.match(r"\s*code for sm_(\d+)", line):
            if name:
                yield name, architecture, counts
            architecture, name = int(header.group(1)), ""
        elif function := re.match(r"\s*Function : (\S+)", line):
            if name:
                yield name, architecture, counts
            name, counts = function.group(1), Counter()
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            counts[instruction.group(1)] += 1
    if name:
        yield name, architecture, counts


def demangled(names: Iterable[str]) -> dict[str, str]:
    """C++ names as they are written, where c++filt is there."""
    names = list(names)
    cxxfilt = shutil.which("c++filt")
    if cxxfilt is None or not names:
        return {name: name for name in names}
    written = subprocess.run([cxxfilt], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    return dict(zip(names, written, strict=True))


def summarize(file: Path, log: str) -> Summary:
    """Read an object; ``log`` is what nvcc with -Xptxas=-v printed when it was made."""
    machine_code, ptx = listed_architectures(file)
    used = resources(log)
    code = {(name, a): counts for name, a, counts in opcodes(_run([cuda_toolkit.tool("cuobjdump"), "-sass", file]))}
    missing = sorted(set(used) - set(code))
    if missing:
        raise RuntimeError(f"{file.name}: ptxas compiled kernels that the disassembly lacks: {missing}")
    written = demangled(sorted({name for name, _ in used}))
    kernels = tuple(
        Kernel(written[name], architecture, opcodes=dict(code[name, architecture]), **numbers)
        for (name, architecture), numbers in sorted(used.items())
    )
    return Summary(str(file), machine_code, ptx, kernels)


def _with_includes(source: Path, seen: dict[Path, bytes] | None = None) -> dict[Path, bytes]:
    """A source and the files of this project that it includes, by path, with what they hold."""
    seen = {} if seen is None else seen
    if source not in seen:
        seen[source] = source.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', seen[source], re.M):
            for folder in (source.parent, ROOT / "csrc"):
                included = (folder / name.decode()).resolve()
                if included.is_file():
                    _with_includes(included, seen)
                    break
    return seen


def _key(source: Path, options: list[str]) -> str:
    toolkit = cuda_toolkit.find()
    tools = [toolkit.version, cuda_toolkit.version_of(cuda_toolkit.tool("cuobjdump")), str(SUMMARY_FORMAT)]
    digest = hashlib.sha256(json.dumps([options, tools]).encode())
    for path, text in sorted(_with_includes(source).items()):
        digest.update(path.name.encode() + b"\0" + text)
    return digest.hexdigest()[:20]


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """While inside, no other process is inside with the same path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compiled(source: Path, architectures: Iterable[int] = ARCHITECTURES, ptx: int | None = PTX) -> Summary:
    """The summary of one source, compiled now or kept from before. Raises RuntimeError with nvcc's words."""
    options = [*FLAGS, *code_options(architectures, ptx)]
    folder = KEPT / f"{source.stem}-{_key(source, options)}"
    kept = folder / "summary.json"
    with _only_one(KEPT / f"{source.stem}.lock"):
        if not kept.exists():
            folder.mkdir(exist_ok=True)
            object_file = folder / f"{source.stem}.o"
            log = _run([cuda_toolkit.find().nvcc, *options, "-c", source, "-o", object_file])
            (folder / "nvcc.log").write_text(log)
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(summarize(object_file, log))))
            partial.replace(kept)
    read = json.loads(kept.read_text())
    kernels = tuple(Kernel(**kernel) for kernel in read["kernels"])
    return Summary(read["file"], tuple(read["machine_code"]), tuple(read["ptx"]), kernels)


def compiled_all(
    sources: Iterable[Path], architectures: Iterable[int] = ARCHITECTURES, ptx: int | None = PTX, jobs: int = 2
) -> dict[str, Summary]:
    """Summaries by stem, ``jobs`` sources at once."""
    sources, architectures = list(sources), tuple(architectures)
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda source: compiled(source, architectures, ptx), sources)
        return {source.stem: summary for source, summary in zip(sources, done, strict=True)}
