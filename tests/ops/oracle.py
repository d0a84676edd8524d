"""The mathematics of a LoRA layer in fp64, and layers to try it on.

W = weight * weight_scale,  D = keep_mask / (1 - p)
S = (x D) A'                y = x W' + bias + s S B'
dS = s g B                  dx = g W + (dS A) D      dA = dS' (x D)      dB = s g' S
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyadapt.ops import linear, lora, quantize  # noqa: F401  (registers the ops)
from pyadapt.ops.philox import keep_mask


@dataclass(frozen=True)
class Layer:
    """One layer's operands, as the ops take them."""

    x: Tensor
    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    g: Tensor
    scaling: float = 1.5
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def forward(self, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(y, S) of the op under test."""
        return torch.ops.pyadapt.lora_forward(
            self.x,
            self.weight,
            self.weight_scale,
            self.bias,
            self.A,
            self.B,
            self.scaling,
            self.dropout_p,
            self.seed,
            out_dtype or self.x.dtype,
        )

    def backward(self, S: Tensor, need_dx: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dA, dB) of the op under test."""
        return torch.ops.pyadapt.lora_backward(
            self.g,
            self.x,
            self.weight,
            self.weight_scale,
            self.A,
            self.B,
            S,
            self.scaling,
            self.dropout_p,
            self.seed,
            need_dx,
        )

    def exact_weight(self) -> Tensor:
        """W in fp64."""
        W = self.weight.double()
        return W if self.weight_scale is None else W * self.weight_scale.double()[:, None]

    def exact_mask(self) -> Tensor:
        """D (M, K) in fp64."""
        if self.dropout_p == 0.0:
            return torch.ones(self.x.shape, dtype=torch.float64, device=self.x.device)
        keep = keep_mask(self.seed, self.dropout_p, *self.x.shape, self.x.device)
        return keep.double() / (1.0 - self.dropout_p) if self.dropout_p < 1.0 else keep.double()

    def exact_forward(self) -> tuple[Tensor, Tensor]:
        """(y, S) in fp64."""
        x, A, B = self.x.double(), self.A.double(), self.B.double()
        S = (x * self.exact_mask()) @ A.t()
        y = x @ self.exact_weight().t() + self.scaling * (S @ B.t())
        return (y if self.bias is None else y + self.bias.double()), S

    def exact_backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dA, dB) in fp64."""
        x, g, A, B = self.x.double(), self.g.double(), self.A.double(), self.B.double()
        D = self.exact_mask()
        _, S = self.exact_forward()
        dS = self.scaling * (g @ B)
        return g @ self.exact_weight() + (dS @ A) * D, dS.t() @ (x * D), self.scaling * (g.t() @ S)

    def exact_frozen(self) -> tuple[Tensor, Tensor]:
        """(x W', g W) in fp64: the parts of y and dx that the frozen layer gives."""
        W = self.exact_weight()
        return self.x.double() @ W.t(), self.g.double() @ W

    def with_dropout(self, p: float, seed: int = 20240229) -> Layer:
        """The same layer with dropout."""
        return replace(self, dropout_p=p, seed=torch.tensor([seed], device=self.x.device))

    def to(self, device: torch.device) -> Layer:
        """The same layer there."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def make_layer(
    M: int,
    K: int,
    N: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    transposed: bool = False,
    bias: bool = True,
) -> Layer:
    """Random operands. ``transposed`` hands out a view of a weight stored as (K, N), as transformers' Conv1D does."""
    weight_dtype = weight_dtype or dtype
    stored = (K, N) if transposed else (N, K)
    if weight_dtype == torch.int8:
        weight, scale = torch.randint(-127, 128, stored, dtype=torch.int8), torch.rand(N) / 64 + 1e-3
    else:
        weight, scale = torch.randn(stored).to(weight_dtype), None
    return Layer(
        x=torch.randn(M, K).to(dtype),
        weight=weight.t() if transposed else weight,
        weight_scale=scale,
        bias=torch.randn(N).to(dtype) if bias else None,
        A=torch.randn(r, K).to(adapter_dtype),
        B=torch.randn(N, r).to(adapter_dtype),
        g=torch.randn(M, N).to(dtype),
    )


class Owner(nn.Module):
    """What owns a frozen weight, for the autograd Functions; counts how often it was asked."""

    def __init__(self, weight: Tensor, weight_scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.weight_scale, self.bias = weight, weight_scale, bias
        self.asked = 0

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight, weight_scale, bias)."""
        self.asked += 1
        return self.weight, self.weight_scale, self.bias
