"""Each CUDA kernel by itself, against what the GPU does at best: ``python -m benchmarks.cuda.kernels``.

Time, TFLOP/s, GB/s, and the ratio to a floor measured in the same run: for the products torch's frozen product of the
same shape in 16 bits; for the passes their bytes, each operand read or written once, at the rate of a large copy. The
targets are those of the list of kernels (docs/kernels.md); a ratio above its target is written as a miss. Kernels that
no function runs alone are differences of two (the S pass is inside the forward, the g and dA passes in the backward).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cuda import timing
from benchmarks.cuda.timing import Ceilings, Deadline, Run
from benchmarks.measure import Timing, write_csv
from pyadapt.ops import quantize  # noqa: F401  (registers its ops)

RESULTS = Path(__file__).parents[1] / "results" / "cuda_kernels.csv"
SECONDS = 420.0
SCALING, DROPOUT = 2.0, 0.05
SHAPES = ((4096, 4096), (4096, 11008), (8192, 8192))  # K, N
LARGE_M, SMALL_M = (2048, 8192, 512), (1, 16, 64)
COPY_SHARE = 0.85  # of the copy bandwidth, that few rows must reach


@dataclass(frozen=True)
class Point:
    """One shape."""

    M: int
    K: int
    N: int
    r: int
    base: str  # "16" or "int8"
    dropout: float

    @property
    def weight_bytes(self) -> int:
        """W as it is stored, with the row scales of int8."""
        return self.N * self.K + 4 * self.N if self.base == "int8" else 2 * self.N * self.K

    @property
    def few_rows(self) -> bool:
        """Whether it is for the skinny kernel."""
        return max(SMALL_M) >= self.M

    @property
    def least_bytes(self) -> int:
        """What the smallest call of this shape reads: x or g, and of few rows W."""
        return self.weight_bytes if self.few_rows else 2 * self.M * min(self.K, self.N)

    @property
    def copy_bytes(self) -> int:
        """What a copy of all operands takes."""
        return 2 * self.N * self.K + self.weight_bytes + 4 * self.M * (self.K + self.N)

    def __str__(self) -> str:
        """Short, for tables."""
        return f"M={self.M} K={self.K} N={self.N} r={self.r} base={self.base} p={self.dropout:g}"


@dataclass(frozen=True)
class Work:
    """What a kernel must do at least: operations, bytes, its floor ("product" or "traffic"), its target over that."""

    operations: float
    moved: float
    floor: str
    target: float | None


def work_of(kernel: str, point: Point, capability: tuple[int, int]) -> Work:
    """The counts of a kernel, by its number in the list of kernels and its name."""
    M, K, N, r = point.M, point.K, point.N, point.r
    product, low = 2.0 * M * N * K, 2.0 * M * r
    x, y, W = 2 * M * K, 2 * M * N, point.weight_bytes
    A, B, S = 4 * r * K, 4 * N * r, 4 * M * r
    forward_target = 1.15 if capability >= (9, 0) else 1.25
    library_target = 1.08 if M >= 8192 else None
    scaled_g = y if point.base == "int8" else 0
    return {
        "1 linear_forward": Work(product, x + W + y, "product", forward_target),
        "1 lora_forward - shrink": Work(product + low * N, x + W + y + S + B, "product", forward_target),
        "1+3 lora_forward": Work(product + low * (N + K), x + W + y + A + B + S, "product", None),
        "2 linear_dx": Work(product, y + W + x, "product", 1.2),
        "2 lora_backward - gradients": Work(product + low * K, y + W + x + S + A, "product", 1.2),
        "2+4+5 lora_backward": Work(product + 3 * low * (N + K), 2 * (x + y) + W + 2 * (A + B) + S, "product", None),
        "3 shrink": Work(low * K, x + A + S, "traffic", 1.2),
        "4 gradients, g pass": Work(2 * low * N, y + scaled_g + 2 * B + 2 * S, "traffic", 1.3),
        "5 gradients, dA pass": Work(low * K, x + S + A, "traffic", 1.3),
        "6 skinny forward": Work(product, x + W + y, "traffic", 1 / COPY_SHARE),
        "7 library forward": Work(product + low * (N + K), x + W + y + A + B + S, "product", library_target),
        "12 quantize": Work(0.0, 3 * N * K + 4 * N, "traffic", None),
        "12 dequantize": Work(0.0, 3 * N * K + 4 * N, "traffic", None),
        "expand": Work(low * N, 2 * y + S + B, "traffic", None),
        "expand_dx": Work(low * K, 2 * x + S + A, "traffic", None),
    }[kernel]


# What a row that is the difference of two others is made of.
DIFFERENCES = {
    "1 lora_forward - shrink": ("1+3 lora_forward", "3 shrink"),
    "2 lora_backward - gradients": ("2+4+5 lora_backward", "4+5 gradients"),
}


def points(r: int = 16) -> list[Point]:
    """The grid, the most telling first."""
    found = [Point(M, K, N, r, base, p) for p in (0.0, DROPOUT) for M in LARGE_M for K, N in SHAPES for base in BASES]
    few = [Point(M, K, N, r, base, 0.0) for M in SMALL_M for K, N in SHAPES for base in BASES]
    other_ranks = [Point(2048, 4096, 4096, rank, base, p) for rank in (8, 64) for base in BASES for p in (0.0, DROPOUT)]
    head = [found[0], found[1], few[0], few[1]]
    return list(dict.fromkeys(head + found[: len(found) // 2] + few + other_ranks + found))


BASES = ("16", "int8")


@dataclass
class Operands:
    """A copy of everything that the kernels of one shape work on."""

    x: Tensor
    g: Tensor
    weight: Tensor  # 16 bits, for the floor
    stored: Tensor  # as the base is stored
    scale: Tensor | None
    A: Tensor
    B: Tensor
    S: Tensor
    dS: Tensor
    y: Tensor
    dx: Tensor
    narrow_x: Tensor  # (M, 16): next to nothing, for a pass over g alone
    narrow_g: Tensor
    narrow_A: Tensor
    narrow_B: Tensor
    seed: Tensor


NARROW = 16


def operands_of(point: Point, dtype: torch.dtype, device: str) -> Operands:
    """Random numbers of the sizes of a layer."""
    M, K, N, r = point.M, point.K, point.N, point.r

    def random(*shape: int, dtype: torch.dtype = dtype, over: int = 1) -> Tensor:
        return (torch.randn(*shape, device=device) / over**0.5).to(dtype)

    weight = random(N, K, over=K)
    stored, scale = torch.ops.pyadapt.quantize_rows(weight) if point.base == "int8" else (weight, None)
    f32 = torch.float32
    return Operands(
        x=random(M, K),
        g=random(M, N),
        weight=weight,
        stored=stored,
        scale=scale,
        A=random(r, K, dtype=f32, over=K),
        B=random(N, r, dtype=f32, over=r),
        S=random(M, r, dtype=f32),
        dS=random(M, r, dtype=f32),
        y=random(M, N),
        dx=random(M, K),
        narrow_x=random(M, NARROW),
        narrow_g=random(M, NARROW),
        narrow_A=random(r, NARROW, dtype=f32),
        narrow_B=random(NARROW, r, dtype=f32),
        seed=torch.tensor([1], device=device),
    )


def cases_of(point: Point, dtype: torch.dtype, data: list[Operands]) -> dict[str, Run]:
    """The kernels that a shape is for, by name, and the floor of the products."""
    from pyadapt.ops import panels
    from pyadapt.ops.kernels import cuda

    p, s = point.dropout, SCALING

    def each(run: Callable[[Operands], object]) -> Run:
        return lambda i: run(data[i])

    cases = {"product": each(lambda o: F.linear(o.x, o.weight))}
    if point.few_rows:
        cases["6 skinny forward"] = each(lambda o: cuda.linear_forward(o.x, o.stored, o.scale, None, dtype, True))
        return cases

    def adapter(o: Operands) -> tuple[object, ...]:
        return o.A, o.B, s, p, o.seed

    def backward(o: Operands) -> object:
        return cuda.lora_backward(o.g, o.x, o.stored, o.scale, o.A, o.B, o.S, s, p, o.seed, True)

    cases |= {
        "1+3 lora_forward": each(lambda o: cuda.lora_forward(o.x, o.stored, o.scale, None, *adapter(o), dtype)),
        "2+4+5 lora_backward": each(backward),
        "3 shrink": each(lambda o: cuda.shrink(o.x, o.A, p, o.seed)),
        "4+5 gradients": each(lambda o: cuda.gradients(o.g, o.x, o.A, o.B, o.S, s, p, o.seed, o.scale)),
        "7 library forward": each(lambda o: panels.lora_forward(o.x, o.stored, o.scale, None, *adapter(o), dtype)),
    }
    if p:
        cases["expand_dx"] = each(lambda o: cuda.expand_dx_(o.dx, o.dS, o.A, p, o.seed))
        cases["5 gradients, dA pass"] = each(
            lambda o: cuda.gradients(o.narrow_g, o.x, o.A, o.narrow_B, o.S, s, p, o.seed)
        )
        return cases
    cases |= {
        "1 linear_forward": each(lambda o: cuda.linear_forward(o.x, o.stored, o.scale, None, dtype)),
        "2 linear_dx": each(lambda o: cuda.linear_dx(o.g, o.stored, o.scale, dtype)),
        "4 gradients, g pass": each(
            lambda o: cuda.gradients(o.g, o.narrow_x, o.narrow_A, o.B, o.S, s, p, o.seed, o.scale)
        ),
        "5 gradients, dA pass": each(
            lambda o: cuda.gradients(o.narrow_g, o.x, o.A, o.narrow_B, o.S, s, p, o.seed)
        ),
        "expand": each(lambda o: cuda.expand_(o.y, o.S, o.B, None, None, s)),
        "expand_dx": each(lambda o: cuda.expand_dx_(o.dx, o.dS, o.A, p, o.seed)),
    }  # fmt: skip
    if point.base == "int8":
        cases["12 quantize"] = each(lambda o: cuda.quantize_rows(o.weight))
        cases["12 dequantize"] = each(lambda o: cuda.dequantize_rows(o.stored, o.scale, dtype))
    return cases


def rows_of(
    point: Point, timings: dict[str, Timing], ceilings: Ceilings, capability: tuple[int, int]
) -> list[dict[str, object]]:
    """The rows of one shape; an "over_floor" above the target says miss."""
    median = {name: t.median for name, t in timings.items()}
    for name, (whole, part) in DIFFERENCES.items():
        if whole in median and part in median and median[whole] > median[part]:  # not so where noise is all there is
            median[name] = median[whole] - median[part]
    rows = []
    for name, ms in sorted(median.items()):
        if name in ("product", "4+5 gradients"):
            continue
        work = work_of(name, point, capability)
        if work.floor == "product":
            floor = median.get("product", float("nan"))
        else:
            floor = 1e3 * work.moved / ceilings.bandwidth
        ratio = ms / floor
        quantiles = timings.get(name)
        rows.append(
            {"kernel": name, "M": point.M, "K": point.K, "N": point.N, "r": point.r, "base": point.base}
            | {"dropout": point.dropout, "median_ms": round(ms, 5)}
            | {f"p{int(100 * q)}_ms": round(quantiles.quantile(q), 5) if quantiles else "" for q in (0.2, 0.8)}
            | {"tflops": round(work.operations / ms / 1e9, 2), "gbs": round(work.moved / ms / 1e6, 1)}
            | {"of_arithmetic": round(1e3 * work.operations / ms / ceilings.arithmetic, 3)}
            | {"of_bandwidth": round(1e3 * work.moved / ms / ceilings.bandwidth, 3)}
            | {"floor": work.floor, "floor_ms": round(floor, 5), "over_floor": round(ratio, 3)}
            | {"target": round(work.target, 3) if work.target else "", "verdict": verdict(ratio, work.target)}
        )
    return rows


def verdict(ratio: float, target: float | None) -> str:
    """Whether a ratio is within its target; a NaN is not."""
    if target is None:
        return ""
    return "ok" if ratio <= target else "miss"


def table(rows: list[dict[str, object]]) -> str:
    """The rows of one shape for reading."""
    lines = [f"{'kernel':30}{'ms':>10}{'TFLOP/s':>9}{'GB/s':>8}{'over':>7} {'floor':8}{'target':>7}"]
    for row in rows:
        lines.append(
            f"{row['kernel']:30}{row['median_ms']:>10}{row['tflops']:>9}{row['gbs']:>8}{row['over_floor']:>7} "
            f"{row['floor']:8}{row['target']:>7} {row['verdict']}"
        )
    return "\n".join(lines)


def headline(rows: list[dict[str, object]]) -> list[str]:
    """For each kernel with a target: how many shapes are within it, the worst ratio and where."""
    lines = []
    for kernel in sorted({str(row["kernel"]) for row in rows if row["verdict"]}):
        mine = [row for row in rows if row["kernel"] == kernel]
        missed = [row for row in mine if row["verdict"] == "miss"]
        worst = max(mine, key=lambda row: float(str(row["over_floor"])) / float(str(row["target"])))
        where = f"M={worst['M']} K={worst['K']} N={worst['N']} r={worst['r']} {worst['base']} p={worst['dropout']}"
        lines.append(
            f"{'miss' if missed else 'ok':4} {kernel:28} {len(mine) - len(missed)}/{len(mine)} within "
            f"{worst['target']} over {worst['floor']}; worst {worst['over_floor']} at {where}"
        )
    return lines


def measure(deadline: Deadline, seconds_a_shape: float, csv: Path | None) -> list[dict[str, object]]:
    """Every shape that there is time for; rows are written as they come."""
    capability = torch.cuda.get_device_capability()
    dtype = timing.activation_dtype(capability)
    ceilings = timing.measured_ceilings(dtype)
    where = {**timing.environment(), "dtype": str(dtype).removeprefix("torch.")}
    print(", ".join(f"{key} {value}" for key, value in where.items()), ceilings, sep="\n")
    where |= {
        "copy_gbs": f"{ceilings.bandwidth / 1e9:.0f}",
        "product_tflops": f"{ceilings.arithmetic / 1e12:.0f}",
    }
    rows: list[dict[str, object]] = []
    for point in points():
        if not deadline.allows(str(point), 2 * seconds_a_shape):
            continue
        data = [operands_of(point, dtype, "cuda") for _ in range(timing.copies_of(point.least_bytes, point.copy_bytes))]
        timings, failed = timing.interleave(cases_of(point, dtype, data), len(data), seconds_a_shape)
        fresh = rows_of(point, timings, ceilings, capability)
        print(f"\n{point}\n{table(fresh)}", flush=True)
        for name, error in failed.items():
            print(f"{name:30} failed: {error}")
            rows.append({"kernel": name, "failed": error})
        if csv and fresh:
            write_csv(csv, fresh, where)
        rows += fresh
        del data
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, append to the CSV; 1 where a kernel failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="benchmarks.cuda.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default %(default)s)")
    parser.add_argument("--seconds-a-shape", type=float, default=2.0, help="of measuring (default %(default)s)")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="append the rows here (default %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.cuda.kernels needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    deadline = Deadline(options.seconds)
    rows = measure(deadline, options.seconds_a_shape, options.csv)
    failed = [row for row in rows if "failed" in row]
    print("\nsummary: kernels", *headline([row for row in rows if "failed" not in row]), deadline.report(), sep="\n")
    for row in failed[:4]:
        print(f"failed {row['kernel']}: {row['failed']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
