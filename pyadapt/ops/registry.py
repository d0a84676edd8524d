"""Registers the ops of the ``torch.library`` namespace ``pyadapt``, each in one call.

An op has one implementation for every device: it asks the route table (``routes.py``) which of its forms serves, and
the table sends a device without kernels to plain torch. ``fake`` gives shapes and dtypes for tracing. Gradients are not
registered: the ``torch.autograd.Function`` beside the op has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The library object owns the registrations: they live as long as this module.
_LIBRARY = torch.library.Library("pyadapt", "DEF")


def define(schema: str, implementation: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
    """Define one op by its schema, e.g. ``"scale(Tensor x) -> Tensor"``."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyadapt::{name}", fake, lib=_LIBRARY)
