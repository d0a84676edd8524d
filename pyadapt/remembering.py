"""Keeping what is made of frozen parameters, so that decoding token by token does not make it anew each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Remembered:
    """A value made of parameters, kept while these are frozen and the same; a copy of a model has none yet."""

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Any = None

    def get(self, parameters: Iterable[nn.Parameter], make: Callable[[], Any]) -> Any:
        """The value of `make()`, or that of an earlier call with the same parameters.

        What is in training is never kept: engines that shard parameters change them without leaving a trace.

        Args:
            parameters: all that the value depends on.
            make: makes it.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._key = None
            return make()
        every = list(parameters)
        if any(p.requires_grad or p.is_inference() for p in every):
            self._key = None
            return make()
        device = every[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (autocast, *((id(p), p._version) for p in every))
        if key != self._key:
            self._key, self._value = key, make()
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembered:
        return Remembered()

    def __reduce__(self) -> Any:
        return Remembered, ()
