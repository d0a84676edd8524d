"""Scaling what adapters add, without touching their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..layer import adapted_layers
from ..tokens import TokenUnit

if TYPE_CHECKING:
    from .state import WithAdapters


def scalings(model: WithAdapters, names: Sequence[str]) -> dict[Any, float]:
    """The scaling of each unit of the named adapters.

    Raises:
        ValueError: an adapter's method has none.
    """
    return {unit: unit.scaling for _, unit in _units(model, names)}


def set_scalings(values: dict[Any, float]) -> None:
    """Put back what `scalings` gave."""
    for unit, value in values.items():
        unit.scaling = value


def rescale(model: WithAdapters, names: Sequence[str], factor: float) -> None:
    """Multiply the scaling of the named adapters."""
    set_scalings({unit: value * _number(factor) for unit, value in scalings(model, names).items()})


def set_scale(model: WithAdapters, name: str, scale: float) -> None:
    """Make the scaling of an adapter `scale` times that of its configuration."""
    config: Any = model.peft_config[name]
    set_scalings({unit: _number(scale) * config.scaling_of(path) for path, unit in _units(model, [name])})


def _units(model: WithAdapters, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for path, layer in adapted_layers(model):
        for name in names:
            unit = layer.unit(name)
            if unit is not None and not isinstance(unit, TokenUnit):
                if not hasattr(unit, "scaling"):
                    raise ValueError(
                        f"adapter {name!r} has no scaling: {type(unit).__name__} multiplies by no constant"
                    )
                yield path, unit


def _number(factor: float) -> float:
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise TypeError(f"the factor is a {type(factor).__name__}; a number is needed")
    return float(factor)
