"""A batch in which every sequence has an adapter of its own, in one linear layer: ``python -m benchmarks.rows``.

Sixteen sequences of T tokens: the frozen layer, one adapter for all of them, sixteen adapters, and what peft does for
sixteen: one eager LoRA a slice of the batch. Forward without gradients (serving) and forward with backward (training).
The target is sixteen adapters in 1.3 times the time of one. Times are medians of interleaved runs in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.layer import Owner, Run, step
from benchmarks.measure import Timing, environment, interleave, write_csv
from pyadapt.ops import quantize  # noqa: F401  (registers its ops)
from pyadapt.ops.linear import FrozenLinear
from pyadapt.ops.lora import LoraLinear
from pyadapt.ops.lora_rows import LoraRows

SEQUENCES, RANK, SCALING = 16, 16, 2.0
TOKENS, QUICK_TOKENS = (1, 32, 128), (1, 4)
SIZE, QUICK_SIZE = 2048, 128  # K = N
BASES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.bfloat16}  # dtype of x

Layer = tuple[Callable[[Tensor], Tensor], list[Tensor]]  # the forward, and what is trained


def layers(tokens: int, size: int, base: str) -> dict[str, Layer]:
    """Every case by name."""
    dtype = BASES[base]
    weight = (torch.randn(size, size) / size**0.5).to(dtype)
    owner = Owner(*torch.ops.pyadapt.quantize_rows(weight)) if base == "int8" else Owner(weight)
    As = [(torch.randn(RANK, size) / size**0.5).requires_grad_() for _ in range(SEQUENCES)]
    Bs = [torch.randn(size, RANK).requires_grad_() for _ in range(SEQUENCES)]
    each = torch.tensor([[i * tokens, i] for i in range(SEQUENCES)])
    scalings, dropouts = [SCALING] * SEQUENCES, [0.0] * SEQUENCES

    def frozen(x: Tensor) -> Tensor:
        return FrozenLinear.apply(x, owner, dtype)

    def one(x: Tensor) -> Tensor:
        return LoraLinear.apply(x, As[0], Bs[0], owner, SCALING, 0.0, None, dtype)

    def one_segment(x: Tensor) -> Tensor:
        return LoraRows.apply(x, owner, each[:1], scalings[:1], dropouts[:1], None, dtype, As[0], Bs[0])

    def sixteen(x: Tensor) -> Tensor:
        return LoraRows.apply(x, owner, each, scalings, dropouts, None, dtype, *As, *Bs)

    def by_slices(x: Tensor) -> Tensor:
        y = frozen(x) if base == "int8" else F.linear(x, weight)
        slices = [
            part + (SCALING * F.linear(F.linear(rows.to(A.dtype), A), B)).to(dtype)
            for part, rows, A, B in zip(y.split(tokens), x.split(tokens), As, Bs, strict=True)
        ]
        return torch.cat(slices)

    return {
        "frozen": (frozen, []),
        "one adapter": (one, [As[0], Bs[0]]),
        "one adapter as a segment": (one_segment, [As[0], Bs[0]]),
        "16 adapters": (sixteen, [*As, *Bs]),
        "16 adapters, a slice each": (by_slices, [*As, *Bs]),
    }


def serving(forward: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    """A forward without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return forward(x)

    return run


def report(title: str, timings: dict[str, Timing], **columns: object) -> list[dict[str, object]]:
    """Print one block and give its rows for the CSV."""
    floors = ("frozen", "one adapter")
    print(f"\n{title}\n{'':28}{'ms':>10}" + "".join(f"{'/ ' + floor:>16}" for floor in floors))
    rows = []
    for name, timing in timings.items():
        ratios = {floor: timing.median / timings[floor].median for floor in floors}
        print(f"{name:28}{timing.median:10.3f}" + "".join(f"{ratio:16.2f}" for ratio in ratios.values()), flush=True)
        spread = {"p20_ms": round(timing.quantile(0.2), 4), "p80_ms": round(timing.quantile(0.8), 4)}
        rows.append(
            {**columns, "case": name, "median_ms": round(timing.median, 4), **spread, "runs": len(timing.times)}
            | {f"over {floor}": round(ratio, 3) for floor, ratio in ratios.items()}
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append to a CSV where one is named."""
    parser = argparse.ArgumentParser(prog="benchmarks.rows", description=__doc__.split("\n")[0])
    parser.add_argument("--base", choices=BASES, nargs="*", default=list(BASES), help="of the frozen weight")
    parser.add_argument("--tokens", type=int, nargs="*", help="of a sequence (default 1 32 128)")
    parser.add_argument("--size", type=int, default=SIZE, help="K and N (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each block (default %(default)s)")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--quick", action="store_true", help="one small layer, a fraction of a second: for tests")
    options = parser.parse_args(arguments)
    size, seconds = (QUICK_SIZE, 0.05) if options.quick else (options.size, options.seconds)

    torch.manual_seed(0)
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    rows: list[dict[str, object]] = []
    for base in options.base:
        for tokens in options.tokens or (QUICK_TOKENS if options.quick else TOKENS):
            cases = layers(tokens, size, base)
            x = torch.randn(SEQUENCES * tokens, size).to(BASES[base])
            columns = {"base": base, "sequences": SEQUENCES, "tokens": tokens, "K": size, "N": size, "rank": RANK}
            where = f"{base}, {SEQUENCES} sequences of {tokens} tokens, K=N={size} r={RANK}"
            runs = {name: serving(forward, x) for name, (forward, _) in cases.items()}
            rows += report(f"forward, {where}", interleave(runs, seconds, most=1000), step="serving", **columns)
            runs = {name: step(forward, x, trained) for name, (forward, trained) in cases.items()}
            timings = interleave(runs, seconds, most=1000)
            rows += report(f"forward + backward, {where}", timings, step="training", **columns)
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
