"""What only a machine with a GPU can show: ``python scripts/gpu_check.py [part ...]``, or ``make gpu-check``.

    build         pyadapt with CUDA for this GPU alone, without isolation or network, into build/gpu-check/site
    tests         the kernels' and the ops' tests on ``cuda``
    conformance   each primitive on the GPU against its definition and against the emulator
    sanitizer     compute-sanitizer, memcheck and racecheck, on a short list of those tests
    kernels       each kernel's time against what the GPU does at best
    layers        a layer's time against the frozen one, peft's and its compiled form
    benchmarks    kernels and layers

Without a part, all in this order. A part that needs a build makes one where there is none of these sources. Each part
has a time limit, and its output goes to a log in build/gpu-check, or in $OUT where that is set. It stops at the first
part that fails (not with --keep-going); the last lines of the output, 40 at most, are the summary. Rows of the
benchmarks are appended to benchmarks/results. Exit status: 0 all is well, 1 something failed, 2 there is no GPU.

It needs python with torch for CUDA, nvcc, cmake, ninja, pybind11, scikit-build-core, pytest and, for `layers`, peft.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cuda_toolkit

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-check"
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 480.0  # seconds a part
SUMMARY_LINES = 40

# Small shapes of every kernel, by every path to memory.
SANITIZED = (
    "test_values or test_few_rows or test_dropout or test_row_strides or test_weight_stored_transposed or "
    "test_quantise or test_dequantise"
)


@dataclass(frozen=True)
class Gpu:
    """The GPU in use."""

    name: str
    architecture: str  # such as 90
    described: str


@dataclass
class Result:
    """How one part went."""

    part: str
    status: str  # ok, FAILED, or "not run"
    seconds: float
    note: str = ""
    summary: list[str] = field(default_factory=list)


@dataclass
class Context:
    """What every part is told."""

    gpu: Gpu
    logs: Path
    keep_going: bool

    @property
    def site(self) -> Path:
        """Where the build is installed."""
        return WORK / "site"

    def environment(self) -> dict[str, str]:
        """pyadapt from the build and from nowhere else; benchmarks from the source tree."""
        path = os.pathsep.join([str(self.site), str(ROOT)])
        return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


Command = list[str]


class NotHere(RuntimeError):
    """A part cannot run on this machine, for a reason that is nobody's fault."""


# --- what the parts run ---


def pytest_command(context: Context, *arguments: str) -> Command:
    """Pytest on the source tree's tests; started where no pyadapt lies."""
    stop = [] if context.keep_going else ["-x"]
    configured = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *configured, "-q", *stop, *arguments]


def test_path(name: str) -> str:
    """A path in tests/."""
    return str(ROOT / "tests" / name)


def which_pyadapt() -> Command:
    """Fails where the tests would be those of another pyadapt than the build's."""
    code = (
        "import pathlib, sys, pyadapt; from pyadapt import native; site = pathlib.Path(sys.argv[1]); "
        "found = pathlib.Path(pyadapt.__file__).resolve(); "
        "sys.exit(f'pyadapt is {found}, not the one built into {site}: an editable installation is in the way; use "
        "another environment') if site.resolve() not in found.parents else None; "
        "sys.exit('the CUDA kernels do not serve this GPU') if not native.cuda_isa() else "
        "print(native.describe())"
    )
    return [sys.executable, "-c", code, str(WORK / "site")]


def build(context: Context) -> list[Command]:
    """The package for this GPU alone."""
    toolkit = cuda_toolkit.find()
    (WORK / "built-from").unlink(missing_ok=True)
    shutil.rmtree(context.site, ignore_errors=True)
    defines = ["PYADAPT_CUDA=on", f"PYADAPT_CUDA_ARCHITECTURES={context.gpu.architecture}-real"]
    defines += [argument.removeprefix("-D") for argument in toolkit.cmake_arguments]
    settings = [f"--config-settings=cmake.define.{define}" for define in defines]
    settings.append(f"--config-settings=build-dir={WORK / 'cmake'}")
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    return [
        [sys.executable, "-m", "pip", "install", str(ROOT), "-v", *offline, "--target", str(context.site), *settings]
    ]


def tests(context: Context) -> list[Command]:
    """The kernels on the GPU, then the ops, which find them by their routes."""
    elsewhere = ("cuda/test_static.py", "cuda/test_build.py", "cuda/test_toolkit.py", "ops/test_benchmark.py")
    ignored = [argument for name in elsewhere for argument in ("--ignore", test_path(name))]
    return [which_pyadapt(), pytest_command(context, test_path("cuda"), test_path("ops"), *ignored)]


def conformance(context: Context) -> list[Command]:
    """Primitives."""
    return [pytest_command(context, test_path("conformance"))]


def sanitizer(context: Context) -> list[Command]:
    """Only pyadapt's kernels are instrumented; every tensor has an allocation of its own, so that its end is known."""
    try:
        tool = cuda_toolkit.tool("compute-sanitizer")
    except cuda_toolkit.ToolMissing:
        raise NotHere("compute-sanitizer is not installed") from None
    short = pytest_command(context, test_path("cuda/test_lora.py"), test_path("cuda/test_quantize.py"), "-k", SANITIZED)
    common = ["--kernel-name", "kernel_substring=pyadapt", "--target-processes", "application-only"]
    common += ["--error-exitcode", "9", "--print-limit", "20"]
    memcheck = [str(tool), "--tool", "memcheck", "--padding", "64", "--report-api-errors", "no", *common, *short]
    racecheck = [str(tool), "--tool", "racecheck", *common, *short]
    uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    return [which_pyadapt(), [*uncached, *memcheck], [*uncached, *racecheck]]


def benchmark(context: Context, name: str) -> list[Command]:
    """A module of benchmarks/cuda, which stops by itself before the limit."""
    rows = context.logs / f"cuda_{name}.csv"
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.cuda.{name}", "--csv", str(rows), "--seconds", str(LIMIT - 60)]
    return [which_pyadapt(), command]


PARTS: dict[str, Callable[[Context], list[Command]]] = {
    "build": build,
    "tests": tests,
    "conformance": conformance,
    "sanitizer": sanitizer,
    "kernels": lambda context: benchmark(context, "kernels"),
    "layers": lambda context: benchmark(context, "layers"),
}
GROUPS = {"benchmarks": ("kernels", "layers"), "all": tuple(PARTS)}


# --- running them ---


def run(command: Command, log: Path, environment: dict[str, str], seconds: float) -> int | None:
    """The exit status, None where the time was over; output is appended to the log. Nothing is left running."""
    with log.open("a") as output:
        print(f"$ {' '.join(command)}", file=output, flush=True)
        process = subprocess.Popen(
            command, cwd=WORK, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            # What it started belongs to its session, and ends with it.
            for kind in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, kind)
                except ProcessLookupError:
                    break
                time.sleep(0.2)
            process.wait()


def run_part(name: str, context: Context, limit: float = LIMIT) -> Result:
    """Run a part's commands one after another, up to the first that fails."""
    start = time.monotonic()
    log = context.logs / f"{name}.log"
    log.unlink(missing_ok=True)
    try:
        commands = PARTS[name](context)
    except (NotHere, cuda_toolkit.ToolMissing) as error:
        status = "not run" if isinstance(error, NotHere) else "FAILED"
        return Result(name, status, time.monotonic() - start, str(error))
    status, note = "ok", ""
    for command in commands:
        code = run(command, log, context.environment(), limit - (time.monotonic() - start))
        if code is None:
            status, note = "FAILED", f"over its limit of {limit:.0f} s"
        elif code:
            status, note = "FAILED", f"exit status {code}"
        if code != 0:
            break
    text = log.read_text(errors="replace")
    if status != "ok" and "Device not supported" in text and name == "sanitizer":
        status, note = "not run", "compute-sanitizer does not support this machine's GPU"
    if name == "build" and status == "ok":
        (WORK / "built-from").write_text(fingerprint(context.gpu.architecture))
    note = "; ".join(part for part in (note, pytest_counts(text)) if part)
    result = Result(name, status, time.monotonic() - start, note, summary_in(text, name))
    if GROUPS["benchmarks"].count(name):
        kept = keep_rows(context.logs / f"cuda_{name}.csv", RESULTS / f"cuda_{name}.csv")
        result.note = "; ".join(part for part in (result.note, kept) if part)
    return result


def pytest_counts(text: str) -> str:
    """Pytest's last words on each of its runs."""
    found = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|skipped|error)[^\n=]*?) in [\d.]+s", text, re.M)
    return "; ".join(found)


def summary_in(text: str, name: str) -> list[str]:
    """The lines below a benchmark's own summary."""
    _, found, below = text.partition(f"summary: {name}\n")
    return below.rstrip().splitlines() if found else []


def keep_rows(fresh: Path, kept: Path) -> str:
    """Append rows to the kept ones, under the same header; says how many."""
    if not fresh.exists():
        return "no rows"
    with fresh.open(newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if kept.exists():
        with kept.open(newline="") as file:
            if next(csv.reader(file), None) != header:
                return f"{len(rows)} rows in {fresh}: {kept.name} has other columns"
    kept.parent.mkdir(parents=True, exist_ok=True)
    new = not kept.exists()
    with kept.open("a", newline="") as file:
        csv.writer(file).writerows([header, *rows] if new else rows)
    return f"{len(rows)} rows"


def fingerprint(architecture: str) -> str:
    """Changes with anything that the build is made from."""
    digest = hashlib.sha256(architecture.encode())
    files = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    for folder in ("csrc", "pyadapt"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".cpp", ".hpp", ".cu", ".cuh"}]
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def is_built(architecture: str) -> bool:
    """Whether the build is there, and of these sources."""
    stamp = WORK / "built-from"
    return (WORK / "site").is_dir() and stamp.exists() and stamp.read_text() == fingerprint(architecture)


def find_gpu() -> Gpu:
    """The GPU as torch sees it. Raises NotHere with a sentence."""
    code = (
        "import json, sys, torch\n"
        "if not torch.cuda.is_available(): sys.exit('torch ' + torch.__version__ + ' sees no CUDA GPU')\n"
        "major, minor = torch.cuda.get_device_capability()\n"
        "name, versions = torch.cuda.get_device_name(), f'torch {torch.__version__}, CUDA {torch.version.cuda}'\n"
        "print(json.dumps({'name': name, 'architecture': f'{major}{minor}', 'described': versions}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["torch did not start"]
        raise NotHere(f"gpu-check needs a CUDA GPU, and there is none: {last[0]}")
    return Gpu(**json.loads(done.stdout.splitlines()[-1]))


# --- the summary ---


def summarize(gpu: Gpu, results: list[Result]) -> list[str]:
    """A table of the parts, then what the benchmarks found, 40 lines at most."""
    lines = [f"gpu-check: {gpu.name}, sm_{gpu.architecture}, {gpu.described}"]
    lines.append(f"{'part':13}{'result':9}{'seconds':>8}  note")
    lines += [f"{r.part:13}{r.status:9}{r.seconds:8.0f}  {r.note}".rstrip() for r in results]
    found = [(r.part, r.summary) for r in results if r.summary]
    room = SUMMARY_LINES - len(lines) - len(found)
    for i, (part, summary) in enumerate(found):
        shown = fitted(summary, room // (len(found) - i))
        lines += [f"-- {part}", *shown]
        room -= len(shown)
    return lines


def fitted(lines: list[str], room: int) -> list[str]:
    """The first lines, as many as there is room for."""
    return lines if len(lines) <= room else [*lines[: room - 1], f"... {len(lines) - room + 1} more in the log"]


def chosen_parts(names: list[str]) -> list[str]:
    """The parts asked for, in order, each once."""
    asked = [part for name in names or ["all"] for part in GROUPS.get(name, (name,))]
    return [part for part in PARTS if part in asked]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and print the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join([*PARTS, *GROUPS])}")
    parser.add_argument("--keep-going", action="store_true", help="go on after a part or a test that fails")
    parser.add_argument("--architecture", help="build for this one, such as 90, where there is no GPU")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS and part not in GROUPS]
    if unknown:
        parser.error(f"no part {unknown[0]}; there are {', '.join([*PARTS, *GROUPS])}")
    parts = chosen_parts(options.parts)
    try:
        gpu = Gpu("no GPU", options.architecture, "built only") if options.architecture else find_gpu()
    except NotHere as error:
        print(error)
        return 2
    if options.architecture and parts != ["build"]:
        print("gpu-check: with --architecture there is the part build alone")
        return 2
    if "build" not in parts and not is_built(gpu.architecture):
        parts.insert(0, "build")

    logs = Path(os.environ.get("OUT") or WORK)
    for folder in (logs, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    context = Context(gpu, logs, options.keep_going)
    results: list[Result] = []
    for part in parts:
        print(f"{part} ...", flush=True)
        results.append(run_part(part, context))
        if results[-1].status == "FAILED":
            log = logs / f"{part}.log"
            print(*(log.read_text(errors="replace").splitlines()[-60:] if log.exists() else []), sep="\n")
            if part == "build" or not options.keep_going:
                break
    results += [Result(part, "not run", 0.0) for part in parts[len(results) :]]
    print(*summarize(gpu, results), sep="\n")
    return 1 if any(result.status == "FAILED" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
