"""How far the factors of an AdaLoRA adapter are from orthogonal: a term of the loss.

    R = weight / n  sum over all A of ||A A' - I||  and over all B of ||B' B - I||   (Frobenius norms, n matrices)

With G = P P' - I, dR/dP = 2 weight / (n ||G||) G P for P = A, and the same of the transpose for P = B. Forward makes
the r x r Grams alone, backward one product of their size with each matrix; the matrices are not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import registry
from .config import AdaLoraConfig
from .leaving import Leaves, deviation, slope
from .unit import AdaLoraUnit


def before_call(config: AdaLoraConfig, units: Sequence[AdaLoraUnit], sharded: bool) -> None:
    """See `LayerMethod.before_call`: let the units of a sharded model leave what `penalty` needs (see `leaving`)."""
    if not units or config.orth_reg_weight == 0 or (units[0].leaves is None and not sharded):
        return
    own = [unit for unit in units if unit.source is None]
    leaves = Leaves(config.orth_reg_weight / (2 * len(own))) if sharded else None
    for unit in own:
        unit.leaves = leaves


def penalty(config: AdaLoraConfig, units: Sequence[AdaLoraUnit]) -> Tensor | None:
    """The term for the adapter that has `units`, a scalar in the factors' dtype, fp32 at least; None where it is 0.

    Where an engine has sharded the factors, it is that of the latest call of the model.

    Raises:
        RuntimeError: an engine has sharded the factors, and the model has not been called yet.
    """
    own = [unit for unit in units if unit.source is None]
    if config.orth_reg_weight == 0 or not own:
        return None
    if own[0].leaves is not None:
        return own[0].leaves.total(own)
    if any(unit.lora_A.dim() != 2 or unit.lora_B.dim() != 2 for unit in own):
        raise RuntimeError(
            "an engine has sharded the factors of an AdaLoRA adapter, whose orthogonality is known after a call of the "
            "model, inside of which they are whole: call it first; orth_reg_weight=0 leaves it out of the loss"
        )
    return Orthogonality.apply(config.orth_reg_weight, *(unit.lora_A for unit in own), *(unit.lora_B for unit in own))


def orthogonality(model: nn.Module) -> Tensor:
    """What a call of `model` adds to its loss: the term above, for each active AdaLoRA adapter in training.

    For those who work out a loss of their own; where the model works it out, the term is in it already.

    Raises:
        ValueError: the model carries no adapters of pyadapt.
    """
    ask = getattr(model, "adapter_penalty", None)
    if ask is None:
        raise ValueError(f"this {type(model).__name__} carries no adapters of pyadapt")
    term: Tensor | None = ask()
    return torch.zeros(()) if term is None else term


class Orthogonality(registry.Function):
    """R of matrices of which the first half are wide (A) and the others tall (B)."""

    @staticmethod
    def forward(ctx: Any, weight: float, *matrices: Tensor) -> Tensor:
        """The scalar R, on the device of the first matrix."""
        home, half = matrices[0].device, len(matrices) // 2
        deviations = []
        with torch.autocast(home.type, enabled=False):
            for i, matrix in enumerate(matrices):
                deviations.append(deviation(matrix, is_wide=i < half))
            norms = torch.stack([torch.linalg.vector_norm(G).to(home) for G in deviations])
            total = norms.sum() * (weight / len(matrices))
        ctx.weight = weight
        ctx.save_for_backward(norms, *matrices, *deviations)
        return total

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each matrix."""
        norms, *rest = ctx.saved_tensors
        count = len(rest) // 2
        matrices, deviations = rest[:count], rest[count:]
        with torch.autocast(norms.device.type, enabled=False):
            # A matrix that is orthogonal already has no direction to move in.
            factors = torch.where(norms > 0, 2 * ctx.weight / count * g / norms, 0.0)
            gradients = []
            for i, (matrix, G, factor) in enumerate(zip(matrices, deviations, factors.unbind(), strict=True)):
                gradients.append(slope(matrix, G, factor, is_wide=i < count // 2))
        return None, *gradients
