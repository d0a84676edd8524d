"""Reading a module's parameters at less than the cost of `nn.Module.__getattr__`, which a tiny layer would feel."""

from __future__ import annotations

from typing import Any


def parameter(module: Any, name: str) -> Any:
    """`module.<name>`, whether it is a parameter, None, or what a sharding engine has put in its place."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)
