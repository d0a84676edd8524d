"""One linear layer, forward and backward, against the frozen layer: ``python -m benchmarks.layer``.

The floor is torch's frozen layer in the same dtype: y = x W' and dx = g W. Where the processor has no bf16 instructions
that floor is no use (torch's bf16 dx is a plain loop there), so each row also gives its ratio to torch's frozen layer
in fp32 and to pyadapt's own frozen layer. A case that would take longer than a few seconds a run is left out, and says
so. Times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Timing, environment, interleave, write_csv
from pyadapt.ops import quantize  # noqa: F401  (registers its ops)
from pyadapt.ops.linear import FrozenLinear
from pyadapt.ops.lora import LoraLinear

SHAPES = [(512, 2048, 2048), (2048, 1024, 1024), (1024, 2048, 5504)]  # M, K, N
QUICK_SHAPES = [(64, 256, 256)]
DECODING, QUICK_DECODING = [(2048, 2048), (4096, 4096)], [(256, 256)]  # K, N
RANK, SCALING, DROPOUT = 16, 2.0, 0.05
SLOWEST = 4.0  # seconds a run, beyond which a case is left out unless asked for
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

Run = Callable[[], object]


class Owner(nn.Module):
    """Owns a frozen weight, as an adapted layer does."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.scale = weight, scale

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight, weight_scale, bias)."""
        return self.weight, self.scale, None


def step(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> Run:
    """Forward and backward of one layer, gradients thrown away."""
    x = x.clone().requires_grad_()
    g = torch.randn_like(forward(x))
    return lambda: torch.autograd.grad(forward(x), [x, *parameters], g)


def peft_layer(weight: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """An eager peft LoRA layer with its defaults: fp32 adapters over the base's dtype."""
    import peft

    N, K = weight.shape
    base = nn.Sequential(nn.Linear(K, N, bias=False, dtype=weight.dtype))
    base[0].weight.data = weight
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["0"]))
    return model.base_model.model[0], [p for p in model.parameters() if p.requires_grad]


def training_cases(M: int, K: int, N: int, dtype: torch.dtype) -> dict[str, Run]:
    """Every case of one shape, by name."""
    x, weight = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    q, scale = torch.ops.pyadapt.quantize_rows(weight)
    A, B = (torch.randn(RANK, K) / K**0.5).requires_grad_(), torch.randn(N, RANK).requires_grad_()
    dense, int8 = Owner(weight), Owner(q, scale)
    seed = torch.tensor([1])

    def lora(owner: Owner, p: float) -> Run:
        return step(lambda x: LoraLinear.apply(x, A, B, owner, SCALING, p, seed, dtype), x, [A, B])

    weight32 = weight.float()
    peft_forward, peft_parameters = peft_layer(weight)
    cases = {
        "torch frozen": step(lambda x: F.linear(x, weight), x, []),
        "torch frozen fp32": step(lambda x: F.linear(x, weight32), x.float(), []),
        "pyadapt frozen": step(lambda x: FrozenLinear.apply(x, dense, dtype), x, []),
        "pyadapt lora": lora(dense, 0.0),
        "pyadapt lora dropout": lora(dense, DROPOUT),
        "pyadapt frozen int8": step(lambda x: FrozenLinear.apply(x, int8, dtype), x, []),
        "pyadapt lora int8": lora(int8, 0.0),
        "peft lora": step(peft_forward, x, peft_parameters),
    }
    if dtype == torch.float32:
        del cases["torch frozen"]
    return cases


def decoding_cases(K: int, N: int) -> dict[str, Run]:
    """A forward of one token in bf16."""
    x, weight = torch.randn(1, K).bfloat16(), (torch.randn(N, K) / K**0.5).bfloat16()
    q, scale = torch.ops.pyadapt.quantize_rows(weight)
    forward = torch.ops.pyadapt.linear_forward.default
    return {
        "torch frozen": lambda: F.linear(x, weight),
        "pyadapt frozen": lambda: forward(x, weight, None, None, torch.bfloat16),
        "pyadapt frozen int8": lambda: forward(x, q, scale, None, torch.bfloat16),
    }


def seconds_of(run: Run) -> float:
    """The time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def too_slow(M: int, K: int, N: int, dtype: torch.dtype, slowest: float) -> dict[str, str]:
    """Cases to leave out, with the reason: those whose time on a thirty-second of the rows predicts too long a run."""
    few = max(M // 32, 16)
    left_out = {}
    for name, run in training_cases(few, K, N, dtype).items():
        predicted = min(seconds_of(run) for _ in range(3)) * M / few
        if predicted > slowest:
            left_out[name] = f"left out: about {predicted:.0f} s a run"
    return left_out


def report(
    title: str, timings: dict[str, Timing], left_out: dict[str, str], **columns: object
) -> list[dict[str, object]]:
    """Print one block and give its rows for the CSV."""
    floors = ("torch frozen", "torch frozen fp32", "pyadapt frozen")
    print(f"\n{title}\n{'':24}{'ms':>10}" + "".join(f"{'/ ' + floor:>22}" for floor in floors))
    rows = []
    for name, timing in timings.items():
        ratios = {floor: timing.median / timings[floor].median if floor in timings else None for floor in floors}
        cells = "".join(f"{'-' if ratio is None else format(ratio, '.2f'):>22}" for ratio in ratios.values())
        print(f"{name:24}{timing.median:10.3f}{cells}")
        spread = {"p20_ms": round(timing.quantile(0.2), 4), "p80_ms": round(timing.quantile(0.8), 4)}
        rows.append(
            {**columns, "case": name, "median_ms": round(timing.median, 4), **spread, "runs": len(timing.times)}
            | {f"over {floor}": "" if ratio is None else round(ratio, 3) for floor, ratio in ratios.items()}
        )
    for name, reason in left_out.items():
        print(f"{name:24}{reason}")
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append to a CSV where one is named."""
    parser = argparse.ArgumentParser(prog="benchmarks.layer", description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each shape (default 15)")
    parser.add_argument(
        "--slowest", type=float, default=SLOWEST, help="leave out cases of more seconds a run (default %(default)s)"
    )
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--quick", action="store_true", help="one small shape, a fraction of a second: for tests")
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype]
    seconds = 0.2 if options.quick else options.seconds

    torch.manual_seed(0)
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    rows: list[dict[str, object]] = []
    for M, K, N in QUICK_SHAPES if options.quick else SHAPES:
        columns = {"dtype": options.dtype, "M": M, "K": K, "N": N}
        left_out = too_slow(M, K, N, dtype, options.slowest)
        cases = {name: run for name, run in training_cases(M, K, N, dtype).items() if name not in left_out}
        title = f"forward + backward, {options.dtype}, M={M} K={K} N={N} r={RANK}"
        rows += report(title, interleave(cases, seconds), left_out, step="training", **columns)

    for K, N in QUICK_DECODING if options.quick else DECODING:
        with torch.no_grad():
            timings = interleave(decoding_cases(K, N), min(seconds, 4.0), most=3000)
        columns = {"dtype": "bf16", "M": 1, "K": K, "N": N}
        rows += report(f"forward of one token, bf16, K={K} N={N}", timings, {}, step="decoding", **columns)
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
