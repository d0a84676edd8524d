"""The configuration of IA3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...layer import base_modules
from ...layer_config import LayerConfig
from ...targets import ALL_LINEAR, all_linear, matches
from .defaults import as_expression, by_structure, default_feedforward, default_targets, tell


@dataclass
class IA3Config(LayerConfig):
    """Configuration of IA3; names and defaults are those of PEFT. What is not listed: see `LayerConfig`.

    Attributes:
        feedforward_modules: which of the targets have their input scaled and not their output. A list matches by dotted
            suffix, and its names must be among those of `target_modules`; a string is a full-match regular expression.
            None chooses by the model's architecture, among the targets.
        fan_in_fan_out: accepted for PEFT's sake; the orientation is read off the layer itself.
        init_ia3_weights: start from ones, so that the adapter does nothing at first; False draws from N(0, 1).
    """

    peft_type: ClassVar[str] = "IA3"

    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_lists("feedforward_modules")
        self.check_expressions("feedforward_modules")
        if isinstance(self.feedforward_modules, list) and isinstance(self.target_modules, list):
            others = [name for name in self.feedforward_modules if name not in self.target_modules]
            if others:
                raise ValueError(
                    f"feedforward_modules names {', '.join(map(repr, others))}, which target_modules does not: only "
                    "adapted layers can have their input scaled; name them in both, or leave them out"
                )

    def is_feedforward(self, path: str) -> bool:
        """Whether the layer at `path` has its input scaled; of a configuration that says so outright."""
        return bool(self.feedforward_modules) and matches(self.feedforward_modules or [], path)

    def completed(self, model: nn.Module) -> IA3Config:
        """See `LayerConfig.completed`: targets and feed-forward modules by the model's type, else by its structure.

        Raises:
            ValueError: the model's type is in no table, and it has no attention or feed-forward module.
        """
        targets, inputs = self.target_modules, self.feedforward_modules
        if targets is None:
            targets = self._targets_for(model)
            # Names that were given as feed-forward must be among them.
            self.replaced(target_modules=targets)
        elif isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            targets = sorted(all_linear(model))
        adapted = [path for path, _ in base_modules(model) if path and matches(targets, path)]
        if inputs is None:
            known = default_feedforward(model)
            names = by_structure(model)[1] if known is None else known
            inputs = [name for name in names if any(matches([name], path) for path in adapted)]
            if known is None:
                tell(model, "feedforward_modules", inputs)
        if isinstance(inputs, list) and not _means_the_same_to_peft(inputs, targets, adapted):
            inputs = as_expression(inputs)
        return self.replaced(target_modules=targets, feedforward_modules=inputs)

    def _targets_for(self, model: nn.Module) -> list[str]:
        known = default_targets(model)
        if known is not None:
            return known
        outputs, inputs = by_structure(model)
        given = self.feedforward_modules
        targets = sorted({*outputs, *(given if isinstance(given, list) else inputs)})
        if not targets:
            raise ValueError(
                f"no default targets for {type(model).__name__}: it has no linear layer inside an attention or "
                "feed-forward module; name the layers in target_modules, and in feedforward_modules those of them that "
                "are to be scaled at their input"
            )
        tell(model, "target_modules", targets)
        return targets


def _means_the_same_to_peft(inputs: list[str], targets: list[str] | str, adapted: list[str]) -> bool:
    """Whether PEFT takes a list of feed-forward modules, and for the same layers: its match has no dot boundary."""
    is_subset = isinstance(targets, str) or set(inputs) <= set(targets)
    return is_subset and all(peft_matches(inputs, path) == matches(inputs, path) for path in adapted)


def peft_matches(names: list[str], path: str) -> bool:
    """What a list of feed-forward modules matches in PEFT."""
    return any(path.endswith(name) for name in names)
