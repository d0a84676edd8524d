"""The configuration of LoRA."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...layer_config import RankedConfig
from .inits import complete_options

logger = logging.getLogger("pyadapt")

# Which biases can be trained beside A and B.
BIASES = ("none", "lora_only", "all")


@dataclass
class LoraConfig(RankedConfig):
    """Configuration of LoRA; names and defaults are those of PEFT. What is not listed: see `RankedConfig`.

    Attributes:
        lora_alpha: numerator of the scaling.
        lora_dropout: probability that an input element is dropped before A, in [0, 1).
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

    alpha_field: ClassVar[str] = "lora_alpha"

    lora_alpha: float = 8
    lora_dropout: float = 0.0
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
        self.make_lists("target_parameters")
        self.check_probabilities("lora_dropout")
        for option, init in (("loftq_config", "loftq"), ("eva_config", "eva")):
            if getattr(self, option) and self.init_lora_weights != init:
                logger.warning('%s is not used: init_lora_weights is not "%s"', option, init)
        complete_options(self)
        if self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r} is not one of {', '.join(BIASES)}")

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

    def scaling_of(self, path: str) -> float:
        """The factor s for the layer at `path`."""
        return self.alpha_of(path) / math.sqrt(self.rank_of(path)) if self.use_rslora else super().scaling_of(path)
