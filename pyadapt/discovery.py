"""Import every module of a package, so that a new file in it registers itself and nothing else changes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable


def import_submodules(package: str, path: Iterable[str]) -> None:
    """Import each module that lies directly in `package` (its `__name__` and `__path__`)."""
    for found in sorted(pkgutil.iter_modules(path), key=lambda info: info.name):
        importlib.import_module(f"{package}.{found.name}")
