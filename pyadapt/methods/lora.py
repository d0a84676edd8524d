"""LoRA: low-rank adaptation.

    y = x W' + b + s drop(x) A' B',   A (r, K), B (N, r), s = alpha / r   (rsLoRA: alpha / sqrt(r))

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; rsLoRA: Kalajdzievski, 2023.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import BaseWeight
from ..config import AdapterConfig
from ..dtypes import output_dtype
from ..method import AdapterUnit, LayerMethod, register
from ..ops.lora import LoraLinear
from ..seed import draw_seed


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
        init_lora_weights: True: A Kaiming-uniform and B zero; "gaussian": A normal with deviation 1/r and B
            zero; False: both Kaiming-uniform, so that the adapter is not the identity at first (for tests).
        fan_in_fan_out: accepted for PEFT's sake; the orientation is read off the layer itself.
    """

    peft_type: ClassVar[str] = "LORA"
    neutral_keys: ClassVar[dict[str, Any]] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
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
    init_lora_weights: bool | Literal["gaussian"] = True
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset, tuple)):
                setattr(self, name, sorted(value))
        self._check_regular_expressions()
        for where, rank in (("r", self.r), *self.rank_pattern.items()):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"{where}={rank!r}: a rank is a whole number of at least 1")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} is not in [0, 1)")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} is not one of True, False, 'gaussian'")
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

    def scaling_of(self, path: str) -> float:
        """The factor s for the layer at `path`."""
        r, alpha = self.rank_of(path), _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


class LoraUnit(AdapterUnit):
    """A (r, K) and B (N, r) of one LoRA adapter on one layer."""

    file_keys: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(
        self,
        out_features: int,
        in_features: int,
        r: int,
        scaling: float,
        dropout: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        self.scaling = scaling
        self.dropout = dropout

    def reset_parameters(self, init: bool | str) -> None:
        """Initialise A and B as `LoraConfig.init_lora_weights` says."""
        with torch.no_grad():
            if init == "gaussian":
                nn.init.normal_(self.lora_A, std=1 / self.lora_A.shape[0])
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            if init is False:
                nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
            else:
                nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, owner: nn.Module, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`."""
        p = self.dropout if self.training else 0.0
        if y is None:
            seed = draw_seed() if p > 0 else None
            return LoraLinear.apply(x, self.lora_A, self.lora_B, owner, self.scaling, p, seed, output_dtype(x))
        dropped = F.dropout(x, p) if p > 0 else x
        term = F.linear(F.linear(dropped.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return y + (self.scaling * term).to(y.dtype)

    def delta(self) -> Tensor:
        """s B A."""
        wide = torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32
        return self.scaling * (self.lora_B.detach().to(wide) @ self.lora_A.detach().to(wide))

    def extra_repr(self) -> str:
        """Rank, scaling and dropout, for `print(model)`."""
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


@register
class Lora(LayerMethod):
    """LoRA on every layer kind whose frozen weight is a matrix."""

    peft_type: ClassVar[str] = LoraConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = LoraConfig

    @staticmethod
    def shapes(config: LoraConfig, path: str, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """See `LayerMethod.shapes`."""
        r = config.rank_of(path)
        return {"lora_A.weight": (r, in_features), "lora_B.weight": (out_features, r)}

    @staticmethod
    def rank(config: LoraConfig, path: str) -> int:
        """See `LayerMethod.rank`."""
        return config.rank_of(path)

    @staticmethod
    def make_unit(
        config: LoraConfig,
        path: str,
        base: type[BaseWeight],
        layer: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ) -> LoraUnit:
        """See `LayerMethod.make_unit`."""
        out_features, in_features = base.shape(layer)
        unit = LoraUnit(
            out_features,
            in_features,
            config.rank_of(path),
            config.scaling_of(path),
            config.lora_dropout,
            device,
            dtype,
        )
        unit.reset_parameters(config.init_lora_weights)
        return unit

    @staticmethod
    def check(config: LoraConfig, model: nn.Module, paths: list[str]) -> None:
        """A pattern that matches no target is a mistake in its spelling."""
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, option):
                if not any(_matches(pattern, path) for path in paths):
                    raise ValueError(f"{option} {pattern!r} matches none of the {len(paths)} adapted layers")


def _matches(pattern: str, path: str) -> bool:
    """Whether `pattern`, a regular expression, matches a dotted end of `path` (PEFT's rule)."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _by_pattern(patterns: dict[str, Any], path: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if _matches(pattern, path)), otherwise)
