"""The configuration of LoRA."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import AdapterConfig
from .inits import complete_options

logger = logging.getLogger("pyadapt")

# Which biases can be trained beside A and B.
BIASES = ("none", "lora_only", "all")


@dataclass
class LoraConfig(AdapterConfig):
    """Configuration of LoRA; names and defaults are those of PEFT.

    Attributes:
        r: rank of the update, at least 1.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability that an input element is dropped before A, in [0, 1).
        target_modules: layers to adapt. A list matches by dotted suffix, a string is a full-match regular expression,
            `"all-linear"` is every linear layer but the output head, None chooses by the model's architecture.
        exclude_modules: layers to leave out, matched in the same way.
        modules_to_save: modules that are trained whole and saved beside the adapter.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: name of the block list that `layers_to_transform` counts in.
        rank_pattern: path pattern -> rank, where it differs from `r`.
        alpha_pattern: path pattern -> alpha, where it differs from `lora_alpha`.
        use_rslora: divide alpha by sqrt(r) in place of r.
        init_lora_weights: how A and B start; see `inits.INITS`.
        fan_in_fan_out: accepted for PEFT's sake; the orientation is read off the layer itself.
        bias: which biases are trained as well: "none", "lora_only" (of the adapted layers) or "all".
        lora_bias: whether B has a bias of its own, (N,).
        use_dora: weight-decomposed LoRA; see `dora`.
        target_parameters: parameters of three dimensions (experts) to adapt, by dotted suffix.
        trainable_token_indices: rows of the input embedding to train: a list of token ids, or a dict from the name of
            an embedding to such a list.
        ensure_weight_tying: adapt or train what shares its weight with a target in the same way, tied.
        loftq_config: for `init_lora_weights="loftq"`: `loftq_bits`, `loftq_iter` and, over quantised weights,
            `original`; see `loftq`.
        eva_config: for `init_lora_weights="eva"`; see `eva.EvaOptions`.
    """

    peft_type: ClassVar[str] = "LORA"
    neutral_keys: ClassVar[dict[str, Any]] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "corda_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    }

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset, tuple)):
                setattr(self, name, sorted(value))
        self._check_regular_expressions()
        for where, rank in (("r", self.r), *self.rank_pattern.items()):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"{where}={rank!r}: a rank is a whole number of at least 1")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} is not in [0, 1)")
        for option, init in (("loftq_config", "loftq"), ("eva_config", "eva")):
            if getattr(self, option) and self.init_lora_weights != init:
                logger.warning('%s is not used: init_lora_weights is not "%s"', option, init)
        complete_options(self)
        if self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r} is not one of {', '.join(BIASES)}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where to count and needs layers_to_transform, which layers to take")

    def _check_regular_expressions(self) -> None:
        single = ((name, getattr(self, name)) for name in ("target_modules", "exclude_modules", "layers_pattern"))
        keys = ((name, key) for name in ("rank_pattern", "alpha_pattern") for key in getattr(self, name))
        for name, pattern in (*single, *keys):
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from None

    def rank_of(self, path: str) -> int:
        """The rank for the layer at `path`."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def with_rank(self, r: int, paths: Iterable[str]) -> LoraConfig:
        """The same scaling at rank `r` on each of the layers at `paths`, to be filled from an adapter that exists."""
        per_scaling = math.sqrt(r) if self.use_rslora else r
        alphas = {re.escape(path): self.scaling_of(path) * per_scaling for path in paths}
        first = next(iter(alphas.values()))
        if all(alpha == first for alpha in alphas.values()):
            alphas = {}
        return self.replaced(
            r=r, lora_alpha=first, rank_pattern={}, alpha_pattern=alphas, init_lora_weights=True, inference_mode=False
        )

    def alpha_of(self, path: str) -> float:
        """The alpha for the layer at `path`."""
        return _by_pattern(self.alpha_pattern, path, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """The factor s for the layer at `path`."""
        r, alpha = self.rank_of(path), self.alpha_of(path)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern`, a regular expression, matches a dotted end of `path` (PEFT's rule)."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _by_pattern(patterns: dict[str, Any], path: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), otherwise)
