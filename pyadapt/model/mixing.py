"""Batches in which each row has an adapter of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..biases import TrainedBias
from ..layer import AdaptedLayer, LiveDict, SavedModule, base_modules
from ..rows import Rows

# The name that stands for the base model in a list of adapter names; PEFT's.
BASE_MODEL = "__base__"


@contextlib.contextmanager
def mixed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the block, row i of each batch is answered with the adapter `names[i]`.

    Raises:
        ValueError: an adapter that cannot be chosen by row, with the layer that cannot; nothing is changed.
    """
    # One walk for all of it: this is done at each call of the model.
    modules = base_modules(model)
    _check_mixable(modules, names)
    biases = [(module, module.live_bias) for _, module in modules if isinstance(module, TrainedBias)]
    carriers = [module.adapters for _, module in modules if isinstance(module, AdaptedLayer)]
    carriers += [module.copies for _, module in modules if isinstance(module, SavedModule)]
    try:
        # No row has a bias of its own, whatever is at work otherwise: see `_check_mixable`.
        for biased, _ in biases:
            biased.live_bias = None
        for entries in carriers:
            entries.rows = _rows(entries, names)
        yield
    finally:
        for entries in carriers:
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


def _check_mixable(modules: Sequence[tuple[str, nn.Module]], names: Sequence[str]) -> None:
    for path, module in modules:
        for name in dict.fromkeys(names):
            if isinstance(module, TrainedBias) and module.copy_among([name]) is not None:
                raise ValueError(
                    f"adapter {name!r} cannot be chosen by row: it trains the bias of {path}, which all rows share"
                )
            unit = module.unit(name) if isinstance(module, AdaptedLayer) else None
            if unit is not None and not unit.by_row:
                raise ValueError(
                    f"adapter {name!r} cannot be chosen by row: {path or 'the model'} ({type(module).__name__}) "
                    f"{unit.why_not_by_row}"
                )


def _rows(entries: LiveDict, names: Sequence[str]) -> Rows:
    asked = [name for name in dict.fromkeys(names) if name in entries]
    index = {name: position for position, name in enumerate(asked)}
    return Rows(tuple(entries[name] for name in asked), tuple(index.get(name, -1) for name in names))
