"""Arguments that are taken for the sake of another library's callers."""

from __future__ import annotations

from typing import Any


def check_only(given: dict[str, Any], *allowed: str) -> None:
    extra = sorted(given.keys() - set(allowed))
    if extra:
        raise TypeError(f"unexpected argument {', '.join(map(repr, extra))}; known are {', '.join(allowed)}")
