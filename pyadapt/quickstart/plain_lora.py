"""LoRA as one writes it in plain torch, layer by layer: what the fused adapters are timed against."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLoraLinear(nn.Module):
    """y = x W' + b + s drop(x) A' B', each product an operation of its own; A and B stay fp32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        self.dropout = dropout
        self.scaling = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        y = self.base(x)
        dropped = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype)
        return y + (self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)).to(y.dtype)


def add_plain_lora(model: nn.Module, heads: Iterable[nn.Module], rank: int, alpha: float, dropout: float) -> nn.Module:
    """Freeze `model` in place and put plain LoRA on each linear layer outside `heads`, which stay trained."""
    model.requires_grad_(False)
    trained: set[nn.Module] = set()
    for head in heads:
        head.requires_grad_(True)
        trained.update(head.modules())
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child not in trained:
                setattr(parent, name, PlainLoraLinear(child, rank, alpha, dropout))
    return model
