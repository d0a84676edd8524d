"""What the compiler made of the CUDA kernels, checked: ``python scripts/check_cuda_build.py [sources]``.

For each source in csrc/cuda, each release architecture and each kernel: no spills, no stack frame, no local memory, no
atomics, no doubles, registers under a ceiling; tensor-core and asynchronous-copy instructions where they are meant; the
architectures of a release. ``--extension FILE`` checks a finished extension module instead: its architectures, and that
it loads where there is no driver. Exits 1 with the list of what does not hold, 2 where a tool is missing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cuda_objects
import cuda_toolkit
from cuda_objects import Kernel, Summary


@dataclass(frozen=True)
class Demand:
    """An instruction that the kernels of a source, whose names match, must hold on a range of architectures."""

    stem: str
    kernel: str  # a regular expression found in the kernel's name; '' stands for any
    instruction: str
    least: int
    most: int
    every: bool = False  # each matching kernel; else at least one of them

    def applies(self, architecture: int) -> bool:
        """Whether this architecture is meant."""
        return self.least <= architecture <= self.most


NEWEST = max(cuda_objects.ARCHITECTURES)
HALVES, HALVES_SM75, TF32, ASYNC_COPY = "HMMA.16816", "HMMA.1688", "HMMA.1688.F32.TF32", "LDGSTS"

DEMANDS = (
    Demand("gemm", "gemm_kernel", HALVES, 80, NEWEST, every=True),
    Demand("gemm", "gemm_kernel", TF32, 80, NEWEST, every=True),
    Demand("gemm", "gemm_kernel", ASYNC_COPY, 80, NEWEST, every=True),
    Demand("gemm", "gemm_kernel", HALVES_SM75, 75, 75, every=True),
    Demand("skinny", "skinny_kernel", HALVES, 80, NEWEST, every=True),
    Demand("skinny", "skinny_kernel", HALVES_SM75, 75, 75, every=True),
    Demand("shrink", "shrink_kernel", TF32, 80, NEWEST, every=True),
    Demand("gradients", "(gradient|input)_kernel", TF32, 80, NEWEST, every=True),
)

# A kernel that is not for an architecture is an empty body or a trap there: so few instructions, and nothing is asked
# of it.
STUB = 48

# Registers a thread, by a regular expression found in the kernel's name; the first that fits counts. 255 is what the
# hardware has; a lower one holds a kernel to the number of blocks a multiprocessor that it was written for.
CEILINGS: tuple[tuple[str, int], ...] = (
    (r"gemm_kernel<.*Tile<64, 64,", 128),
    (r"\binput_kernel", 128),
    (r"quantize_kernel|add_partials|sum_slices", 48),
    ("", 255),
)

# Never in any kernel: local memory is a spill that ptxas did not call one; sums by atomics have no fixed order; doubles
# run at a thirty-second of the rate or worse.
FORBIDDEN = {
    "local memory": ("LDL", "STL"),
    "atomics": ("ATOM", "ATOMG", "ATOMS", "RED", "REDG"),
    "doubles": ("DADD", "DMUL", "DFMA"),
}


def ceiling(name: str) -> int:
    """The most registers that a kernel may use."""
    return next(most for pattern, most in CEILINGS if re.search(pattern, name))


def kernel_problems(stem: str, kernel: Kernel) -> list[str]:
    """What is wrong with one kernel by itself."""
    where = f"{stem}, sm_{kernel.architecture}, {kernel.name}"
    problems = []
    if kernel.stack_frame:
        problems.append(f"{where}: a stack frame of {kernel.stack_frame} bytes")
    if kernel.spill_stores or kernel.spill_loads:
        problems.append(f"{where}: spills {kernel.spill_stores} bytes, loads back {kernel.spill_loads}")
    if kernel.registers > ceiling(kernel.name):
        problems.append(f"{where}: {kernel.registers} registers, at most {ceiling(kernel.name)} wanted")
    for what, instructions in FORBIDDEN.items():
        found = [opcode for opcode in instructions if kernel.count(opcode)]
        if found:
            problems.append(f"{where}: {what} ({', '.join(found)})")
    return problems


def demand_problems(stem: str, kernels: Iterable[Kernel], demands: Iterable[Demand] = DEMANDS) -> list[str]:
    """The instructions that are not where they are meant."""
    kernels, problems = list(kernels), []
    for demand in demands:
        if demand.stem != stem:
            continue
        for architecture in sorted({kernel.architecture for kernel in kernels if demand.applies(kernel.architecture)}):
            fitting = [
                kernel
                for kernel in kernels
                if kernel.architecture == architecture
                and re.search(demand.kernel, kernel.name)
                and sum(kernel.opcodes.values()) > STUB
            ]
            without = [k.name for k in fitting if not k.count(demand.instruction)]
            where = f"{stem}, sm_{architecture}: no {demand.instruction}"
            if len(without) == len(fitting):
                problems.append(f"{where} in any of {len(fitting)} kernels like '{demand.kernel}'")
            elif demand.every and without:
                problems.append(f"{where} in {', '.join(without)}")
    return problems


def architecture_problems(summary: Summary, architectures: Iterable[int], ptx: int | None) -> list[str]:
    """The architectures that a file lacks or holds beyond what is wanted."""
    name, problems = Path(summary.file).name, []
    if set(summary.machine_code) != set(architectures):
        problems.append(f"{name}: machine code for {summary.machine_code}, wanted {tuple(architectures)}")
    if set(summary.ptx) != ({ptx} - {None}):
        problems.append(f"{name}: PTX of {summary.ptx}, wanted {ptx}")
    for architecture in summary.machine_code:
        if summary.kernels and not any(kernel.architecture == architecture for kernel in summary.kernels):
            problems.append(f"{name}: no kernel for sm_{architecture}")
    return problems


def problems_of(
    stem: str,
    summary: Summary,
    architectures: Iterable[int] = cuda_objects.ARCHITECTURES,
    ptx: int | None = cuda_objects.PTX,
) -> list[str]:
    """Everything that does not hold of one source."""
    problems = architecture_problems(summary, architectures, ptx)
    for kernel in summary.kernels:
        problems += kernel_problems(stem, kernel)
    return problems + demand_problems(stem, summary.kernels)


def needed_libraries(file: Path) -> list[str]:
    """The libraries that the loader looks for with this one."""
    dynamic = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)


def extension_problems(file: Path, architectures: Iterable[int], ptx: int | None) -> list[str]:
    """What does not hold of a finished extension module."""
    machine_code, found_ptx = cuda_objects.listed_architectures(file)
    problems = architecture_problems(Summary(str(file), machine_code, found_ptx, ()), architectures, ptx)
    dynamic = [name for name in needed_libraries(file) if re.match(r"lib(cuda|cudart|nvrtc|nvvm|torch|c10)\b", name)]
    if dynamic:
        problems.append(f"{file.name}: needs {', '.join(dynamic)} to load; cudart is linked in, the driver found later")
    return problems


def table(summaries: dict[str, Summary]) -> str:
    """Registers by kernel and architecture."""
    architectures = sorted({kernel.architecture for summary in summaries.values() for kernel in summary.kernels})
    lines = [f"{'registers':8}" + "".join(f"{a:>6}" for a in architectures) + "  kernel"]
    for stem, summary in summaries.items():
        for name in dict.fromkeys(kernel.name for kernel in summary.kernels):
            used = {kernel.architecture: kernel.registers for kernel in summary.kernels if kernel.name == name}
            cells = "".join(f"{used.get(a, '-'):>6}" for a in architectures)
            lines.append(f"{stem[:8]:9}{cells}  {re.sub(r'pyadapt::(cuda::)?|[(]anonymous namespace[)]::', '', name)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Check, print, and say by the exit status whether all holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: every csrc/cuda/*.cu")
    parser.add_argument("--architectures", help="such as 80,90 (default: those of a release, and PTX of the newest)")
    parser.add_argument("--extension", type=Path, help="check this extension module instead of the sources")
    parser.add_argument("--jobs", type=int, default=2, help="sources compiled at once (default 2)")
    options = parser.parse_args(arguments)
    architectures, ptx = cuda_objects.ARCHITECTURES, cuda_objects.PTX
    if options.architectures:
        architectures, ptx = tuple(int(a) for a in options.architectures.split(",")), None
    try:
        if options.extension:
            problems = extension_problems(options.extension, architectures, ptx)
        else:
            sources = options.sources or sorted(cuda_objects.SOURCES.glob("*.cu"))
            summaries = cuda_objects.compiled_all(sources, architectures, ptx, options.jobs)
            print(table(summaries))
            problems = [
                p for stem, summary in summaries.items() for p in problems_of(stem, summary, architectures, ptx)
            ]
    except cuda_toolkit.ToolMissing as error:
        print(error, file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "all holds")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
