"""What lies beside the tests in a source tree and is not installed: scripts and benchmarks, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """A module of scripts/."""
    return _imported(name, ROOT / "scripts")


def benchmark(name: str) -> ModuleType:
    """A module of benchmarks/, such as ``cuda.kernels``."""
    return _imported(f"benchmarks.{name}", ROOT)


def _imported(name: str, folder: Path) -> ModuleType:
    # Last on the path: an installed pyadapt stays the one that is tested.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(name)
