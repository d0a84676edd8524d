"""What pyadapt finds on this machine: versions, back ends, instruction sets, and the routes that products take."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from . import __version__, native
from .ops import autotune, routes

# Packages whose version decides how pyadapt behaves; those that are not installed are reported as such.
COMPANIONS = ("transformers", "accelerate", "peft", "safetensors", "deepspeed", "bitsandbytes")

# (device, input dtype, weight dtype, tokens): a decoding step and a training step over each kind of base. Those of a
# device that is not there are left out.
CASES = [
    ("cpu", torch.float32, torch.float32, 512),
    ("cpu", torch.bfloat16, torch.bfloat16, 1),
    ("cpu", torch.bfloat16, torch.bfloat16, 512),
    ("cpu", torch.float32, torch.int8, 512),
    ("cpu", torch.bfloat16, torch.int8, 1),
    ("cpu", torch.bfloat16, torch.int8, 512),
    ("cuda", torch.bfloat16, torch.bfloat16, 1),
    ("cuda", torch.bfloat16, torch.bfloat16, 512),
    ("cuda", torch.bfloat16, torch.int8, 512),
    ("cuda", torch.float16, torch.int8, 1),
    ("cuda", torch.float16, torch.int8, 512),
]
CASE_FEATURES, CASE_RANK = 2048, 16


def report() -> dict[str, Any]:
    """Everything that a bug report should say, JSON-ready."""
    return {
        "pyadapt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in COMPANIONS},
        "native": native.describe(),
        "routes": [_route(*case) for case in CASES if case[0] == "cpu" or torch.cuda.is_available()],
        "tuned": _tuned(),
    }


def as_text(values: dict[str, Any]) -> str:
    """The report as lines of `name: value`, and the routes as a table."""
    lines = []
    for name, value in values.items():
        if name in ("routes", "tuned"):
            continue
        inner = value if isinstance(value, dict) else {"": value}
        for key, item in inner.items():
            label = f"{name}.{key}" if key else name
            text = ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else item
            lines.append(f"{label + ':':<24}{'none' if text in (None, '') else text}")
    for name in ("routes", "tuned"):
        if values[name]:
            lines += [f"{name}:", *_table(values[name])]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = list(rows[0])
    cells = [head, *([str(row[column]) for column in head] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def _tuned() -> list[dict[str, Any]]:
    """What was measured on this machine's GPUs so far (`ops/autotune.py`)."""
    rows = []
    for index in range(torch.cuda.device_count() if native.cuda() else 0):
        for key, route, times in autotune.measurements(torch.device("cuda", index)).table():
            rows.append({"device": f"cuda:{index}", "case": key, "route": route, "us": times})
    return rows


def _route(device: str, x: torch.dtype, weight: torch.dtype, tokens: int) -> dict[str, Any]:
    """The route of one LoRA layer's forward."""
    rule = routes.predict("forward", device, x, weight, tokens, CASE_FEATURES, CASE_FEATURES, CASE_RANK)
    return {
        "device": device,
        "x": str(x).removeprefix("torch."),
        "weight": str(weight).removeprefix("torch."),
        "M": tokens,
        "N": CASE_FEATURES,
        "K": CASE_FEATURES,
        "r": CASE_RANK,
        "route": rule.route,
        "reason": rule.reason,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
