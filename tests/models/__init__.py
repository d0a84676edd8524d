"""Tiny random models of real architectures, and what the tests compare them by."""

from __future__ import annotations

from tolerance import assert_near

from .compare import copy_adapter_to_peft, peft_key, peft_twin, snapshot
from .families import ALL, CACHE, FAMILIES, VOCABULARY, Family, build, model_batch, plain_module, tied_llama

__all__ = [
    "ALL",
    "CACHE",
    "FAMILIES",
    "VOCABULARY",
    "Family",
    "assert_near",
    "build",
    "copy_adapter_to_peft",
    "model_batch",
    "peft_key",
    "peft_twin",
    "plain_module",
    "snapshot",
    "tied_llama",
]
