"""What goes on around the kernels: host cost, wrapping, importing, loading. ``python -m benchmarks.surroundings``.

- host: forward and backward of a layer so small that the arithmetic costs nothing, in microseconds over the frozen
  layer; one thread. Batches of runs taken in turns, medians.
- wrap: putting an adapter on a model of 500 linear layers.
- import: ``import pyadapt`` in a fresh process that has torch already, alone and with its first names looked up.
- load: adding 50 adapters of 2 MB to a wrapped model, from files that the page cache holds.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import pyadapt
from benchmarks.measure import Timing, environment, interleave, write_csv

SIZE, ROWS, RANK = 8, 4, 4
BATCH = 50  # runs timed together: one run is near the cost of reading the clock, and never as warm as in a model
WRAPPED, WRAPPED_SIZE = 500, 256  # layers, their width
LOADED, LOADED_LAYERS, LOADED_SIZE, LOADED_RANK = 50, 32, 512, 16  # adapters; 32 x 16 x (512 + 512) fp32 = 2 MiB
IMPORT = "import time, torch; start = time.perf_counter(); import pyadapt{}; print(time.perf_counter() - start)"

Run = Callable[[], object]


def stack(layers: int, size: int) -> nn.Sequential:
    """Linear layers of one width, frozen."""
    return nn.Sequential(*(nn.Linear(size, size) for _ in range(layers))).requires_grad_(False)


def adapted(model: nn.Sequential, rank: int) -> Any:
    """The model with LoRA on every layer."""
    targets = [str(i) for i in range(len(model))]
    return pyadapt.wrap(model, pyadapt.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False))


def adapted_by_peft(model: nn.Sequential, rank: int) -> Any:
    """The same with peft."""
    import peft

    targets = [str(i) for i in range(len(model))]
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False))


# --- host ---


def steps(layer: nn.Module) -> Run:
    """A batch of forwards and backwards of one layer, gradients thrown away."""
    x, g = torch.randn(ROWS, SIZE, requires_grad=True), torch.ones(ROWS, SIZE)
    wanted: list[Tensor] = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> None:
        for _ in range(BATCH):
            torch.autograd.grad(layer(x), wanted, g)

    return run


def host_cases() -> dict[str, tuple[Run, str]]:
    """(run, the frozen case it stands beside) by name."""
    int8, adapted_int8 = (cast(nn.Sequential, pyadapt.quantize(stack(1, SIZE))) for _ in range(2))
    return {
        "torch frozen": (steps(stack(1, SIZE)[0]), "torch frozen"),
        "pyadapt lora": (steps(adapted(stack(1, SIZE), RANK)[0]), "torch frozen"),
        "peft lora": (steps(adapted_by_peft(stack(1, SIZE), RANK).base_model.model[0]), "torch frozen"),
        "pyadapt frozen int8": (steps(int8[0]), "torch frozen"),
        "pyadapt lora int8": (steps(adapted(adapted_int8, RANK)[0]), "pyadapt frozen int8"),
    }


def host(seconds: float) -> list[dict[str, object]]:
    """Microseconds of a forward and backward, and of what lies over the frozen layer."""
    cases = host_cases()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = interleave({name: run for name, (run, _) in cases.items()}, seconds, most=2000)
    finally:
        torch.set_num_threads(threads)
    median = {name: 1e3 * timing.median / BATCH for name, timing in timings.items()}
    print(f"\nforward + backward of a linear layer {SIZE} -> {SIZE}, {ROWS} rows, r={RANK}")
    print(f"{'':24}{'us':>10}{'over':>10}")
    rows = []
    for name, (_, floor) in cases.items():
        over = median[name] - median[floor]
        print(f"{name:24}{median[name]:10.1f}{over:10.1f} {floor}")
        figures = {"median": round(median[name], 2), "unit": "us", "over": round(over, 2), "over what": floor}
        rows.append(row("host", name, timings[name], **figures))
    return rows


# --- seconds ---


def times(prepare: Callable[[], Any], action: Callable[[Any], object], runs: int) -> Timing:
    """Seconds of an action on something made anew each time."""
    timing = Timing()
    for _ in range(runs):
        subject = prepare()
        start = time.perf_counter()
        action(subject)
        timing.times.append(time.perf_counter() - start)
    return timing


def wrapping(layers: int, runs: int) -> dict[str, Timing]:
    """Putting an adapter on every layer of a model."""
    verbs = {"pyadapt": adapted, "peft": adapted_by_peft}
    return {
        name: times(lambda: stack(layers, WRAPPED_SIZE), functools.partial(verb, rank=RANK), runs)
        for name, verb in verbs.items()
    }


def importing(runs: int) -> dict[str, Timing]:
    """``import pyadapt`` over ``import torch``, each time in a fresh process."""

    def seconds(names: str) -> float:
        command = [sys.executable, "-c", IMPORT.format(names)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    names = {"pyadapt": "", "pyadapt, wrap, LoraConfig": "; pyadapt.wrap; pyadapt.LoraConfig"}
    return {case: Timing([seconds(used) for _ in range(runs)]) for case, used in names.items()}


def loading(adapters: int, runs: int) -> dict[str, Timing]:
    """Adding adapters from their folders to a model that has one."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"adapter{i}") for i in range(adapters)]
        saved = adapted(stack(LOADED_LAYERS, LOADED_SIZE), LOADED_RANK)
        for path in paths:
            saved.save_pretrained(path)

        def load(model: Any) -> None:
            for i, path in enumerate(paths):
                model.load_adapter(path, adapter_name=f"loaded{i}")

        def loadable(verb: Callable[..., Any]) -> Any:
            return verb(stack(LOADED_LAYERS, LOADED_SIZE), LOADED_RANK)

        verbs = {"pyadapt": adapted, "peft": adapted_by_peft}
        return {name: times(functools.partial(loadable, verb), load, runs) for name, verb in verbs.items()}


def row(what: str, case: str, timing: Timing, **figures: object) -> dict[str, object]:
    """A row of the CSV."""
    return {"measured": what, "case": case, **figures, "runs": len(timing.times)}


def report_seconds(what: str, title: str, timings: dict[str, Timing]) -> list[dict[str, object]]:
    """Print one block and give its rows."""
    print(f"\n{title}\n{'':24}{'s':>10}")
    for name, timing in timings.items():
        print(f"{name:28}{timing.median:10.3f}")
    empty = {"over": "", "over what": ""}
    return [
        row(what, name, timing, median=round(statistics.median(timing.times), 4), unit="s", **empty)
        for name, timing in timings.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append to a CSV where one is named."""
    parser = argparse.ArgumentParser(prog="benchmarks.surroundings", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("host", "wrap", "import", "load"), help="one of the four")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the host cost (default %(default)s)")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--quick", action="store_true", help="few runs of little: for tests")
    options = parser.parse_args(arguments)
    runs, layers, adapters = (1, 20, 2) if options.quick else (5, WRAPPED, LOADED)

    torch.manual_seed(0)
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    parts: dict[str, Callable[[], list[dict[str, object]]]] = {
        "host": lambda: host(0.1 if options.quick else options.seconds),
        "wrap": lambda: report_seconds("wrap", f"wrapping {layers} linear layers", wrapping(layers, runs)),
        "import": lambda: report_seconds("import", "import pyadapt, over import torch", importing(runs)),
        "load": lambda: report_seconds("load", f"loading {adapters} adapters of 2 MB", loading(adapters, runs)),
    }
    rows = [row for name, part in parts.items() if options.only in (None, name) for row in part()]
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
