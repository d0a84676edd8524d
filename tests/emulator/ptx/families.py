"""The table of instruction families: by the first part of the opcode, what makes C++ of it."""

from __future__ import annotations

from collections.abc import Callable

from .operation import Operation

FAMILIES: dict[str, Callable[[Operation], str]] = {}


def family(*names: str):
    """Enter a function, of an Operation to a C++ statement, into the table."""

    def enter(function: Callable[[Operation], str]) -> Callable[[Operation], str]:
        for name in names:
            if name in FAMILIES:
                raise ValueError(f"{name} has two functions")
            FAMILIES[name] = function
        return function

    return enter
