"""The configuration of AdaLoRA."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..lora.config import LoraConfig

logger = logging.getLogger("pyadapt")

# Options of LoRA without a meaning here, with the value that says so. PEFT takes any other and passes over it, so that
# its files may hold one.
_PASSED_OVER: dict[str, Any] = {"use_rslora": False, "lora_bias": False, "alpha_pattern": {}}

# What PEFT adds to a unit's scaling in the denominator.
_EPSILON = 1e-5


@dataclass
class AdaLoraConfig(LoraConfig):
    """Configuration of AdaLoRA; names and defaults are those of PEFT. What is not listed: see `LoraConfig`.

    Steps are counted from 1. Up to `tinit` all ranks are trained; then the budget falls, with the cube of what is left
    of the way, to `target_r` for the mean layer at `total_step - tfinal`; after that the ranks left are trained.

    Attributes:
        target_r: mean rank of a layer in the end, at most `init_r`.
        init_r: rank of each layer at first; it stays the divisor of the scaling.
        tinit: steps before the budget begins to fall.
        tfinal: steps of training after it has fallen.
        deltaT: steps from one allocation to the next.
        beta1: how much of the smoothed sensitivity is kept in a step, in (0, 1).
        beta2: how much of the smoothed uncertainty is kept in a step, in (0, 1).
        orth_reg_weight: weight in the loss of the distance of A and B from orthogonal matrices.
        total_step: optimizer steps of the whole training; only an adapter that is not trained may leave it out.
        rank_pattern: which ranks of each layer a file still holds, written at the end of the schedule: path of the
            layer with `.lora_E` behind it -> a bool for each of `init_r`.
        lora_alpha: numerator of the scaling `lora_alpha / (init_r + 1e-5)`; 0 or less stands for `init_r`.
        init_lora_weights: True, or False for factors that are not small and E not zero (for tests).
        r: not used; `init_r` is.
    """

    peft_type: ClassVar[str] = "ADALORA"
    # PEFT's table, where it says otherwise than LoRA's.
    default_targets: ClassVar[dict[str, list[str]]] = {
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "roberta": ["query", "key", "value", "dense"],
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    }

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._refuse_what_has_no_meaning()
        super().__post_init__()
        if self.r != 8:
            logger.warning("r=%r is not used: AdaLoRA starts from init_r=%d", self.r, self.init_r)
        # A file may come from a PEFT that did not check; what is not trained has no schedule that could be wrong.
        if not self.inference_mode:
            self._check_training()

    def check_ranks(self) -> None:
        """Refuse what is no rank, and a `rank_pattern` that is not one bool for each of `init_r`."""
        for name in ("target_r", "init_r"):
            _check_whole(name, getattr(self, name), at_least=1)
        if self.rank_pattern is None:
            return
        if not isinstance(self.rank_pattern, dict):
            raise ValueError(f"rank_pattern={self.rank_pattern!r}: {_PATTERN_MEANING}")
        for key, kept in self.rank_pattern.items():
            flags = isinstance(kept, list) and all(isinstance(flag, bool) for flag in kept)
            if not flags or len(kept) != self.init_r:
                raise ValueError(f"rank_pattern[{key!r}]={kept!r}, with init_r={self.init_r}: {_PATTERN_MEANING}")

    def check_patterns(self, places: list[str]) -> None:
        """Refuse a pattern of a layer that is not among the adapted `places`."""
        known = {_pattern_key(place) for place in places}
        for key in self.rank_pattern or {}:
            if key not in known:
                raise ValueError(f"rank_pattern {key!r} names none of the {len(places)} adapted layers")

    def rank_of(self, path: str) -> int:
        """The rank for the layer at `path`: what the pattern has left of `init_r`."""
        kept = (self.rank_pattern or {}).get(_pattern_key(path))
        return self.init_r if kept is None else sum(kept)

    def scaling_of(self, path: str) -> float:
        """The factor s, the same for all layers, whatever ranks are left (PEFT divides by `init_r` throughout)."""
        return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + _EPSILON)

    def with_rank(self, r: int, paths: Iterable[str]) -> AdaLoraConfig:
        """The same scaling with `init_r=r`, to be filled from an adapter that exists.

        Raises:
            ValueError: the adapter is in training: its budget counts the ranks that it has.
        """
        if not self.inference_mode:
            raise ValueError("the ranks of an AdaLoRA adapter in training are its budget and cannot be padded")
        alpha = self.scaling_of("") * (r + _EPSILON)
        return self.replaced(init_r=r, target_r=min(self.target_r, r), lora_alpha=alpha, rank_pattern=None)

    def with_pattern(self, kept: dict[str, list[bool]]) -> AdaLoraConfig:
        """The configuration of a file that holds the ranks `kept`, by path of the layer."""
        return self.replaced(rank_pattern={_pattern_key(path): flags for path, flags in kept.items()})

    def _refuse_what_has_no_meaning(self) -> None:
        meant = {name: getattr(self, name) for name in _PASSED_OVER}
        without = {name: value for name, value in meant.items() if value and value != _PASSED_OVER[name]}
        if isinstance(self.init_lora_weights, str):
            without["init_lora_weights"] = self.init_lora_weights
        for name, value in without.items():
            if not self.inference_mode:
                raise ValueError(f"{name}={value!r}: AdaLoRA has no such option (PEFT takes it and passes over it)")
            logger.warning("%s=%r is passed over: it means nothing to AdaLoRA", name, value)
            setattr(self, name, _PASSED_OVER.get(name, True))
        for name in ("use_dora", "loftq_config", "eva_config", "target_parameters"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: AdaLoRA cannot be combined with it; use LoraConfig")

    def _check_training(self) -> None:
        for name in ("tinit", "tfinal"):
            _check_whole(name, getattr(self, name), at_least=0)
        _check_whole("deltaT", self.deltaT, at_least=1)
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r} is not in (0, 1)")
        if not self.orth_reg_weight >= 0:
            raise ValueError(f"orth_reg_weight={self.orth_reg_weight!r} is negative; 0 leaves the term out")
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r={self.target_r} is above init_r={self.init_r}, from which ranks are only taken away: give "
                f"an init_r above {self.target_r}, or a smaller target_r"
            )
        if self.total_step is None:
            raise ValueError("total_step is missing: give the number of optimizer steps of the whole training")
        _check_whole("total_step", self.total_step, at_least=1)
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"the schedule ends before it begins: tinit={self.tinit} and tfinal={self.tfinal} leave none of "
                f"total_step={self.total_step} steps to lower the budget in; lower one of the two, or train longer"
            )


_PATTERN_MEANING = "it maps the path of a layer and `.lora_E` to a list of init_r bools, and is written by training"


def _pattern_key(path: str) -> str:
    return f"{path}.lora_E"


def _check_whole(name: str, value: Any, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}={value!r} is no whole number of at least {at_least}")
