"""What configurations of methods that adapt single layers have in common: which layers, and which rank on each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import nn

from .config import AdapterConfig

ConfigT = TypeVar("ConfigT", bound="LayerConfig")


@dataclass
class LayerConfig(AdapterConfig):
    """Which layers get an adapter; names and meanings are those of PEFT.

    Attributes:
        target_modules: layers to adapt. A list matches by dotted suffix, a string is a full-match regular expression,
            `"all-linear"` is every linear layer but the output head, None chooses by the model's architecture.
        exclude_modules: layers to leave out, matched in the same way.
        modules_to_save: modules that are trained whole and saved beside the adapter.
    """

    # `config.model_type` -> default targets, where they are others than LoRA's (see `targets`).
    default_targets: ClassVar[dict[str, list[str]]] = {}

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_lists("target_modules", "exclude_modules", "modules_to_save")
        self.check_expressions("target_modules", "exclude_modules")

    def make_lists(self, *options: str) -> None:
        """Turn what users give as a set or a tuple into a list; a set has no order, and becomes a sorted one."""
        for name in options:
            value = getattr(self, name)
            if isinstance(value, (set, frozenset, tuple)):
                setattr(self, name, sorted(value))

    def check_expressions(self, *options: str) -> None:
        """Refuse options that are, or have as keys, strings that are no regular expressions."""
        for name in options:
            value = getattr(self, name)
            for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else []:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from None

    def completed(self: ConfigT, model: nn.Module) -> ConfigT:
        """A copy in which the method says outright what was left to the library, all but the usual targets."""
        return self


@dataclass
class RankedConfig(LayerConfig):
    """Methods whose adapter on a layer has a rank r and a scaling alpha / r.

    Attributes:
        r: rank of the update, at least 1.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: name of the block list that `layers_to_transform` counts in.
        rank_pattern: path pattern -> rank, where it differs from `r`.
        alpha_pattern: path pattern -> alpha, where it differs from the usual one.
    """

    # The field that holds the usual alpha.
    alpha_field: ClassVar[str] = "alpha"

    r: int = 8
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_expressions("layers_pattern", "rank_pattern", "alpha_pattern")
        self.check_ranks()
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where to count and needs layers_to_transform, which layers to take")

    def check_ranks(self) -> None:
        """Refuse what is no rank."""
        for where, rank in (("r", self.r), *self.rank_pattern.items()):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"{where}={rank!r}: a rank is a whole number of at least 1")

    def check_probabilities(self, *options: str) -> None:
        """Refuse options that are no probabilities in [0, 1)."""
        for name in options:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} is not in [0, 1)")

    def check_patterns(self, places: list[str]) -> None:
        """Refuse a pattern that matches none of the adapted `places`: it is a mistake in its spelling."""
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option):
                if not any(matches(pattern, place) for place in places):
                    raise ValueError(f"{option} {pattern!r} matches none of the {len(places)} adapted layers")

    def rank_of(self, path: str) -> int:
        """The rank for the layer at `path`."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """The alpha for the layer at `path`."""
        return _by_pattern(self.alpha_pattern, path, getattr(self, self.alpha_field))

    def scaling_of(self, path: str) -> float:
        """The factor s for the layer at `path`."""
        return self.alpha_of(path) / self.rank_of(path)


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern`, a regular expression, matches a dotted end of `path` (PEFT's rule)."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _by_pattern(patterns: dict[str, Any], path: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), otherwise)
