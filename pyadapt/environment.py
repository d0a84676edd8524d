"""What pyadapt finds on this machine: versions, back ends, instruction sets, and the routes that products take."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from . import __version__, native
from .ops import routes

# Packages whose version decides how pyadapt behaves; those that are not installed are reported as such.
COMPANIONS = ("transformers", "accelerate", "peft", "safetensors", "deepspeed", "bitsandbytes")


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
        "routes": routes.table(),
    }


def as_text(values: dict[str, Any]) -> str:
    """The report as lines of `name: value`, and the routes as a table."""
    lines = []
    for name, value in values.items():
        if name == "routes":
            continue
        inner = value if isinstance(value, dict) else {"": value}
        for key, item in inner.items():
            label = f"{name}.{key}" if key else name
            text = ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else item
            lines.append(f"{label + ':':<24}{'none' if text in (None, '') else text}")
    rows = values["routes"]
    head = list(rows[0])
    cells = [head, *([str(row[column]) for column in head] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines.append("routes:")
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
