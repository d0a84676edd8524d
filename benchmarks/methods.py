"""Every weight-side method on one linear layer, beside peft and LyCORIS: ``python -m benchmarks.methods``.

Forward and backward of an adapted layer, as a user's model runs it, over torch's frozen layer in the same dtype:
y = x W' and dx = g W. Each library has its defaults (adapters in fp32). Times are medians of runs in turns with the
frozen layer, in one process, each library by itself. A case that would take longer than a few seconds a run is left
out (a dash).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyadapt
from benchmarks.layer import DTYPES, QUICK_SHAPES, SHAPES, Run, seconds_of, step
from benchmarks.measure import environment, interleave, write_csv

FLOOR = "torch frozen"
# The floor once more, before it counts: what ran last may have left caches and allocator in another state.
WARMING = "torch frozen, warming"
SLOWEST = 2.0  # seconds a run, beyond which a case is left out unless asked for

# Case -> configuration, under the names that pyadapt and peft share.
SCHEDULE = {"init_r": 12, "target_r": 8, "total_step": 1000}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 16},
    "adalora": {"peft_type": "ADALORA", **SCHEDULE},
    "ia3 output": {"peft_type": "IA3", "feedforward_modules": []},
    "ia3 input": {"peft_type": "IA3", "feedforward_modules": ["0"]},
    "loha": {"peft_type": "LOHA", "r": 8},
    "lokr": {"peft_type": "LOKR", "r": 8},
    "lokr full": {"peft_type": "LOKR", "r": 64},
}
# Case -> module of LyCORIS, its rank and options.
LYCORIS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "lora": ("LoConModule", 16, {}),
    "ia3 output": ("IA3Module", 1, {}),
    "ia3 input": ("IA3Module", 1, {"train_on_input": True}),
    "loha": ("LohaModule", 8, {}),
    "lokr": ("LokrModule", 8, {}),
    "lokr full": ("LokrModule", 64, {}),
}

# What runs a layer, and what it trains.
Adapted = tuple[Callable[[Tensor], Tensor], list[Tensor]]


def plain(weight: Tensor) -> nn.Module:
    """A model of one frozen layer."""
    N, K = weight.shape
    model = nn.Sequential(nn.Linear(K, N, bias=False, dtype=weight.dtype))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def with_pyadapt(weight: Tensor, case: str) -> Adapted:
    """pyadapt's layer."""
    model = pyadapt.wrap(plain(weight), {**CONFIGS[case], "target_modules": ["0"]})
    return model[0], [p for p in model.parameters() if p.requires_grad]


def with_peft(weight: Tensor, case: str) -> Adapted:
    """peft's layer."""
    import peft

    options = {**CONFIGS[case], "target_modules": ["0"]}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(options.pop("peft_type"))](**options)
    model = peft.get_peft_model(plain(weight), config)
    return model.base_model.model[0], [p for p in model.parameters() if p.requires_grad]


def with_lycoris(weight: Tensor, case: str) -> Adapted:
    """LyCORIS' layer."""
    import lycoris.modules as modules

    name, rank, options = LYCORIS[case]
    model = plain(weight)
    module = getattr(modules, name)("layer", model[0], 1.0, rank, rank, **options)
    module.apply_to()
    return model[0], [p for p in module.parameters() if p.requires_grad]


LIBRARIES = {"pyadapt": with_pyadapt, "peft": with_peft, "lycoris": with_lycoris}


def cases(library: str, M: int, K: int, N: int, dtype: torch.dtype) -> Iterator[tuple[str, Run]]:
    """(case, run) of one library on one shape, the frozen layer first."""
    x, weight = torch.randn(M, K).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype)
    frozen = step(lambda x: F.linear(x, weight), x, [])
    yield WARMING, frozen
    yield FLOOR, frozen
    for case in CONFIGS:
        if library != "lycoris" or case in LYCORIS:
            forward, trained = LIBRARIES[library](weight, case)
            yield case, step(forward, x, trained)


def fast_enough(library: str, M: int, K: int, N: int, dtype: torch.dtype, slowest: float) -> set[str]:
    """Cases but those whose time on a few rows predicts too long a run."""
    few = max(M // 8, 16)
    return {
        case
        for case, run in cases(library, few, K, N, dtype)
        if min(seconds_of(run) for _ in range(2)) * M / few <= slowest
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append to a CSV where one is named."""
    parser = argparse.ArgumentParser(prog="benchmarks.methods", description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=15.0, help="a shape and library (default %(default)s)")
    parser.add_argument("--slowest", type=float, default=SLOWEST, help="leave out cases of more seconds a run")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--quick", action="store_true", help="one small shape, a fraction of a second: for tests")
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype]

    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="peft|lycoris")
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    rows: list[dict[str, object]] = []
    for M, K, N in QUICK_SHAPES if options.quick else SHAPES:
        ratios: dict[tuple[str, str], float] = {}
        for library in LIBRARIES:
            chosen = fast_enough(library, M, K, N, dtype, options.slowest)
            runs = {case: run for case, run in cases(library, M, K, N, dtype) if case in chosen}
            timings = interleave(runs, 0.2 if options.quick else options.seconds)
            timings.pop(WARMING, None)
            for case, timing in timings.items():
                ratios[library, case] = ratio = timing.median / timings[FLOOR].median
                spread = {"p20_ms": round(timing.quantile(0.2), 4), "p80_ms": round(timing.quantile(0.8), 4)}
                where = {"dtype": options.dtype, "M": M, "K": K, "N": N, "library": library, "case": case}
                measured = {"median_ms": round(timing.median, 4), **spread, "runs": len(timing.times)}
                rows.append({**where, **measured, f"over {FLOOR}": round(ratio, 3)})
        print(f"\nforward + backward, {options.dtype}, M={M} K={K} N={N}, over the frozen layer")
        print(f"{'':14}" + "".join(f"{library:>12}" for library in LIBRARIES))
        for case in CONFIGS:
            found = [ratios.get((library, case)) for library in LIBRARIES]
            print(f"{case:14}" + "".join(f"{'-' if ratio is None else format(ratio, '.2f'):>12}" for ratio in found))
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
