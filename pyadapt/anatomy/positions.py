"""Where a model turns the positions of tokens into vectors or rotations, as a host of a unit that moves them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..base import Host
from ..layer import AdaptedLayer, base_modules
from ..method import AdapterUnit, UnitBeside
from ..surgery import forward_arguments, original_class

# The last name in the path of a table of learned positions.
TABLES = ("wpe", "position_embeddings", "position_embedding", "embed_positions")


class Positions(Host):
    """A table of learned positions, or the module that makes rotations (RoPE)."""

    name: ClassVar[str] = "positions"
    form: ClassVar[str] = "positions"

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return isinstance(layer, nn.Embedding) or _is_rotary(layer) or _is_made(layer)

    @staticmethod
    def shape(layer: Any) -> tuple[int, int]:
        """See `Host.shape`: positions and features, as far as the module has them."""
        return (layer.num_embeddings, layer.embedding_dim) if isinstance(layer, nn.Embedding) else (0, 0)

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        """See `Host.dtype`."""
        return layer.weight.dtype if isinstance(layer, nn.Embedding) else torch.float32

    @staticmethod
    def stored(layer: Any) -> dict[str, nn.Parameter]:
        """See `Host.stored`."""
        held = {**layer._parameters, **layer._buffers}
        return {name: value for name, value in held.items() if value is not None}

    @staticmethod
    def count(layer: Any) -> int | None:
        """How many positions there are, or None where they do not end with the module."""
        if isinstance(layer, nn.Embedding):
            # RoBERTa's begin behind the position of padding.
            padding = 0 if layer.padding_idx is None else layer.padding_idx + 1
            return layer.num_embeddings - int(getattr(layer, "offset", padding))
        return getattr(getattr(layer, "config", None), "max_position_embeddings", None)


class PositionUnit(UnitBeside):
    """Moves the positions of the text on, past those of a prefix. It has no weights."""

    def __init__(self, config: Any, path: str, base: Any, layer: Any, *rest: Any) -> None:
        super().__init__(config, path, base, layer, *rest)
        self.before = int(config.num_virtual_tokens)
        # Of the host's forward; asked for once, as the question is slow.
        self.names = forward_arguments(layer)

    @classmethod
    def shapes(cls, config: Any, path: str, base: Any, layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        return {}

    def initialize(self, config: Any, path: str, base: Any, layer: Any) -> None:
        """See `AdapterUnit.initialize`: there is nothing to give values to."""

    @staticmethod
    def run(units: Sequence[Any], owner: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        """See `AdapterUnit.run`."""
        for unit in units:
            args, kwargs = unit(args, kwargs, owner)
        return owner.frozen(*args, **kwargs)

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], owner: AdaptedLayer) -> Any:  # type: ignore[override]
        """The arguments of the host's forward, moved on."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        # A plain table's one argument is the positions; the others are told them, or where they begin.
        key = "past_key_values_length"
        if given.get("position_ids") is not None or key not in self.names:
            key = "position_ids" if "position_ids" in self.names else self.names[0]
        return (), {**given, key: given.get(key, 0) + self.before}

    @classmethod
    def check_together(cls, units: Mapping[str, AdapterUnit]) -> None:
        """See `AdapterUnit.check_together`: a table that is adapted itself is looked up by its own unit."""
        others = [name for name, unit in units.items() if not isinstance(unit, PositionUnit)]
        if others:
            raise ValueError(f"adapter {others[0]!r} adapts the table of positions that a prefix moves on")


def position_modules(part: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """(path, module) of what makes positions in `part`, which lies at `prefix` in the model."""
    found = []
    for path, module in base_modules(part):
        is_table = path.rpartition(".")[2] in TABLES and (isinstance(module, nn.Embedding) or _is_made(module))
        if is_table or _is_rotary(module):
            found.append((f"{prefix}.{path}".strip("."), module))
    return found


def _is_made(module: nn.Module) -> bool:
    """Whether a module makes vectors of positions from the tokens and how many came before (M2M100)."""
    return "past_key_values_length" in forward_arguments(module)


def _is_rotary(module: nn.Module) -> bool:
    named = original_class(module).__name__.endswith("RotaryEmbedding")
    return named and "position_ids" in forward_arguments(module)
