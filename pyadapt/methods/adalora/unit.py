"""The weights of an AdaLoRA adapter on one layer, and its mathematics.

    y = x W' + b + s drop(x) (E * A)' B',    A (r, K), B (N, r), E (r, 1), s = alpha / (init_r + 1e-5)

The triplet (row i of A, E[i], column i of B) stands for a pair of singular vectors and its value: E is a diagonal. It
is folded into A, which is tiny beside x and W, so that a layer runs on the kernels of a LoRA of the same rank. Where
the allocation has taken a triplet away, E[i] is 0; in a file written after the last one it is not there at all.

Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ... import low_rank
from ...base import BaseWeight
from ...layer import AdaptedLayer
from ...lookup import parameter
from ...low_rank import LowRank
from ...method import AdapterUnit
from ..lora.unit import LinearUnit as LoraLinearUnit
from .config import AdaLoraConfig
from .leaving import Leaves

# The deviation of A and B at first.
_STD = 0.02


class AdaLoraUnit(AdapterUnit):
    """A, B and E on one layer and, while the schedule runs, what the allocation of ranks has seen of them.

    Attributes:
        scaling: the factor s.
        dropout: the probability p of drop().
        sensitivity_A, sensitivity_B, sensitivity_E: smoothed |parameter * gradient|, as the parameters are shaped;
            fp32, or fp64 for an fp64 adapter.
        uncertainty_A, uncertainty_B, uncertainty_E: smoothed distance of it from its own mean.
        kept: (r,) bool: what the latest allocation has kept.
        settled: () bool: whether that was the last one.
    """

    FACTORS: ClassVar[tuple[str, ...]] = ("A", "B", "E")
    file_keys: ClassVar[dict[str, str]] = {f"lora_{factor}": f"lora_{factor}" for factor in FACTORS}

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_E: nn.Parameter
    kept: Tensor
    settled: Tensor
    # Where the orthogonality is left in forward, while an engine has sharded the parameters (see `leaving`).
    leaves: Leaves | None = None

    def __init__(
        self, config: AdaLoraConfig, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        self.scaling = config.scaling_of(path)
        self.dropout = config.lora_dropout

    @classmethod
    def shapes(cls, config: AdaLoraConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`; those of a convolution are as for its weight flattened to a matrix."""
        r, (out_features, in_features) = config.rank_of(path), base.shape(layer)
        return {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_E": (r, 1)}

    def initialize(self, config: AdaLoraConfig, path: str, base: type[BaseWeight], layer: Any) -> None:
        """See `AdapterUnit.initialize`: E zero, the other factors normal and small.

        All is drawn on the CPU and in PEFT's order, with what it draws and throws away: a seed means the same in both.
        """
        values = {name: torch.randn(getattr(self, name).shape) for name in ("lora_A", "lora_E", "lora_B")}
        torch.randn(1)
        if config.init_lora_weights:
            values["lora_E"].zero_()
            values["lora_A"].normal_(0, _STD)
            values["lora_B"].normal_(0, _STD)
        with torch.no_grad():
            for name, value in values.items():
                getattr(self, name).copy_(value)

    def start_training(self, config: AdaLoraConfig) -> None:
        """See `AdapterUnit.start_training`; of an adapter whose ranks were allocated before it was saved, nothing."""
        if config.rank_pattern is not None:
            return
        for factor in self.FACTORS:
            held = getattr(self, f"lora_{factor}").detach()
            # 16 bits would lose products of small weights with small gradients.
            dtype = torch.promote_types(held.dtype, torch.float32)
            for kind in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{kind}_{factor}", torch.zeros_like(held, dtype=dtype))
        ranks = self.lora_E.shape[0]
        self.register_buffer("kept", torch.ones(ranks, dtype=torch.bool, device=self.lora_E.device))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool, device=self.lora_E.device))

    def training_state(self) -> dict[str, Tensor]:
        """See `AdapterUnit.training_state`; nothing once the ranks are settled."""
        return dict(self.named_buffers(recurse=False)) if self.is_scheduled and not self.settled else {}

    @property
    def is_scheduled(self) -> bool:
        """Whether ranks are allocated on this layer."""
        return "kept" in self._buffers and self.source is None

    def low_rank(self) -> LowRank | None:
        """See `AdapterUnit.low_rank`; None for a layer that has no rank left."""
        E = parameter(self, "lora_E")
        if E.shape[0] == 0 or type(self) is not LinearUnit:
            return None
        return self._term(parameter(self, "lora_A"), parameter(self, "lora_B"), E)

    def _term(self, A: Tensor, B: Tensor, E: Tensor) -> LowRank:
        return LowRank(A * E, B, self.scaling, self.dropout if self.training else 0.0)

    def _watched(self) -> tuple[Tensor, Tensor]:
        """A and B, whose orthogonality is left for the loss where that is asked for; in forward."""
        A, B = parameter(self, "lora_A"), parameter(self, "lora_B")
        return (A, B) if self.leaves is None else self.leaves.watch(self, A, B)

    def delta(self) -> Tensor:
        """s B (E * A), (N, K); fp32, or fp64 for an fp64 adapter."""
        A, B, E = (factor.detach() for factor in (self.lora_A, self.lora_B, self.lora_E))
        wide = torch.promote_types(A.dtype, torch.float32)
        return self.scaling * (B.to(wide) @ (A.to(wide) * E.to(wide)))

    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`."""
        matrix += self.delta().view_as(matrix)
        return matrix, bias

    def can_take(self, values: Mapping[str, Tensor], config: AdaLoraConfig) -> bool:
        """See `AdapterUnit.can_take`; lower ranks are padded with zeros."""
        return self.can_take_padded(values)

    def take(self, values: Mapping[str, Tensor], config: AdaLoraConfig, path: str) -> None:
        """See `AdapterUnit.take`; the ratio of the scalings goes into E. A schedule starts anew."""
        self.take_padded(values)
        self.lora_E.mul_(config.scaling_of(path) / self.scaling)
        for name, buffer in self.named_buffers(recurse=False):
            buffer.fill_(name == "kept")

    def extra_repr(self) -> str:
        """Rank, scaling and dropout, for `print(model)`."""
        return f"r={self.lora_E.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class LinearUnit(AdaLoraUnit):
    """AdaLoRA on y = x W' + b: one kernel for the frozen product and the adapter's term."""

    @classmethod
    def route(cls, config: AdaLoraConfig, path: str, base: type[BaseWeight], layer: Any, tokens: int) -> str:
        """See `AdapterUnit.route`: that of a LoRA of this rank."""
        return LoraLinearUnit.route(config, path, base, layer, tokens)

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`."""
        E = parameter(self, "lora_E")
        if E.shape[0] == 0:
            return cast(Tensor, owner.frozen(x)) if y is None else y
        return low_rank.linear(x, self._term(*self._watched(), E), owner, y)


class ConvUnit(AdaLoraUnit):
    """AdaLoRA on y = W * x + b in one, two or three dimensions: a convolution down to r channels, then one of kernel 1.

    Stride, padding, dilation and padding mode are those of the layer (PEFT loses the padding mode).
    """

    @classmethod
    def shapes(cls, config: AdaLoraConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`.

        Raises:
            ValueError: the layer has groups.
        """
        if layer.groups > 1:
            raise ValueError(
                f"AdaLoRA's factors make a full matrix, which the weight of a convolution with {layer.groups} groups "
                "is not: name the layer in exclude_modules, or adapt it with LoRA"
            )
        return super().shapes(config, path, base, layer)

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`; x (batch, in, *size), or without the batch."""
        y = cast(Tensor, owner.frozen(x)) if y is None else y
        if self.lora_E.shape[0] == 0:
            return y
        layer: Any = owner
        kernel = layer.kernel_size
        A, B = self._watched()
        A = (A * self.lora_E).unflatten(1, (layer.in_channels, *kernel))
        B = B.view(*B.shape, *(1 for _ in kernel))
        term = low_rank.conv(x, A, B, owner, p=self.dropout if self.training else 0.0)
        return y + (self.scaling * term).to(y.dtype)
