"""Keeping the norms of a layer that serves without training, for as long as nothing they depend on changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import registry


class NormCache:
    """The last norms, with what they were computed from: which tensors, at which address, in which version.

    Nothing is kept where torch counts no versions (inference tensors), where something looks on (a compiler), or where
    an engine may gather other values at the same address.
    """

    def __init__(self) -> None:
        self._key: list[tuple[Any, ...]] = []
        self._norms: Tensor | None = None

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        """Copies and pickles start empty: their tensors are others."""
        return NormCache, ()

    def clear(self) -> None:
        """Forget the norms."""
        self.__init__()  # type: ignore[misc]

    def norms(self, tensors: Sequence[Tensor], scaling: float, compute: Callable[[], Tensor]) -> Tensor:
        """The result of `compute`, which depends on `tensors` and `scaling` and on nothing else."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed or registry.watched(*tensors) or any(tensor.is_inference() for tensor in tensors):
            return compute()
        key = [(weakref.ref(tensor), tensor._version, tensor.data_ptr(), scaling) for tensor in tensors]
        if self._norms is None or key != self._key:
            # An inference tensor could not take part in a later backward.
            with torch.inference_mode(False):
                self._key, self._norms = key, compute()
        return self._norms
