"""Batches in which each row has an adapter of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..biases import biased_modules, choose_biases
from ..layer import LiveDict, adapted_layers, saved_modules
from ..rows import Rows

# The name that stands for the base model in a list of adapter names; PEFT's.
BASE_MODEL = "__base__"


@contextlib.contextmanager
def mixed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the block, row i of each batch is answered with the adapter `names[i]`."""
    chosen: list[LiveDict] = []
    biases = [(module, module.live_bias) for _, module in biased_modules(model)]
    try:
        # No row has a bias of its own, whatever is at work otherwise: see `check_mixable`.
        choose_biases(model, ())
        for _, layer in adapted_layers(model):
            layer.adapters.rows = _rows(layer.adapters, names)
            chosen.append(layer.adapters)
        for _, module in saved_modules(model):
            module.copies.rows = _rows(module.copies, names)
            chosen.append(module.copies)
        yield
    finally:
        for entries in chosen:
            entries.rows = None
        for biased, live in biases:
            biased.live_bias = live


def check_batch(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a list of names that is not as long as the batch.

    Raises:
        ValueError: so it is.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
    if tensors and tensors[0].shape[0] != len(names):
        raise ValueError(f"adapter_names has {len(names)} names, but the batch has {tensors[0].shape[0]} rows")


def check_mixable(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters that cannot be chosen by row.

    Raises:
        ValueError: so it is, with the layer that cannot.
    """
    for path, module in biased_modules(model):
        for name in names:
            if module.copy_among([name]) is not None:
                raise ValueError(
                    f"adapter {name!r} cannot be chosen by row: it trains the bias of {path}, which all rows share"
                )
    for path, layer in adapted_layers(model):
        for name in set(names) & set(layer.adapters):
            unit = layer.unit(name)
            if unit is not None and not unit.by_row:
                raise ValueError(
                    f"adapter {name!r} cannot be chosen by row: {path} ({type(layer).__name__}) mixes the batch's rows"
                )


def _rows(entries: LiveDict, names: Sequence[str]) -> Rows:
    asked = [name for name in dict.fromkeys(names) if name in entries]
    index = {name: position for position, name in enumerate(asked)}
    return Rows(tuple(entries[name] for name in asked), tuple(index.get(name, -1) for name in names))
