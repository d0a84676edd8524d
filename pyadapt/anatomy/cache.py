"""The cache of keys and values of tokens that came before, among the arguments of a module's forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What it is called: by transformers from 5.24 on, before that, and in some models.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among arguments by name, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
