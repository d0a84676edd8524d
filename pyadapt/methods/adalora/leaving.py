"""The orthogonality term where an engine has sharded the factors: they are whole inside their own unit's forward alone.

There each unit leaves the norms of its deviations, of which the term is made when the call of the model is over. Its
backward comes before that of any unit in the call; it leaves the gradient g that has arrived at the term, and each unit
adds g dR/dP to the gradients of its factors in its own backward, for which the engine gathers them again. So it is with
several calls before a backward, several of a unit in a call, and with gradient checkpointing, whose second forward may
be the one that backward goes through.

A unit that was not called adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import registry


class Leaves:
    """What the units of an adapter leave in one call of the model.

    Attributes:
        weight: what a norm is multiplied by in R.
        norms: unit -> ||A A' - I|| and ||B' B - I||, (2,).
        arrived: unit -> the gradient that has arrived at R, until the unit's backward takes it.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.norms: dict[nn.Module, Tensor] = {}
        self.arrived: dict[nn.Module, Tensor] = {}

    @torch.compiler.disable
    def watch(self, unit: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, for the unit to go on with; in its forward."""
        return Watched.apply(self, unit, A, B)

    def total(self, units: Sequence[nn.Module]) -> Tensor | None:
        """R of what was left, a scalar; None where that is nothing."""
        seen = [unit for unit in units if unit in self.norms]
        if not seen:
            return None
        home = self.norms[seen[0]].device
        norms = torch.stack([self.norms[unit].to(home) for unit in seen])
        # No input has a gradient of its own: the units take care of theirs.
        return Total.apply(torch.zeros((), device=home, requires_grad=True), norms, self, seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> Leaves:
        return Leaves(self.weight)


class Watched(registry.Function):
    """A (r, K) and B (N, r) as they are; their part in R is left in forward, and its gradient added in backward."""

    @staticmethod
    def forward(ctx: Any, leaves: Leaves, unit: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the norms."""
        with torch.autocast(A.device.type, enabled=False):
            of_A, of_B = deviation(A, is_wide=True), deviation(B, is_wide=False)
            norms = torch.stack([torch.linalg.vector_norm(of_A), torch.linalg.vector_norm(of_B)])
        leaves.norms[unit] = norms
        ctx.leaves, ctx.unit = leaves, unit
        ctx.save_for_backward(A, B, of_A, of_B, norms)
        return A, B

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, of_A: Tensor, of_B: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that have come, with those of R where they are still to be added."""
        g = ctx.leaves.arrived.pop(ctx.unit, None)
        if g is None:
            return None, None, of_A, of_B
        A, B, G, H, norms = ctx.saved_tensors
        with torch.autocast(A.device.type, enabled=False):
            factors = torch.where(norms > 0, 2 * ctx.leaves.weight * g.to(norms.device) / norms, 0.0)
            return (
                None,
                None,
                of_A + slope(A, G, factors[0], is_wide=True),
                of_B + slope(B, H, factors[1], is_wide=False),
            )


class Total(registry.Function):
    """R of the norms that units have left; its backward leaves them what has arrived."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, norms: Tensor, leaves: Leaves, units: Sequence[nn.Module]) -> Tensor:
        """The scalar R; norms (units, 2)."""
        ctx.leaves, ctx.units = leaves, units
        return norms.t().sum() * leaves.weight

    @staticmethod
    @registry.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        """Leave g for each unit."""
        arrived = ctx.leaves.arrived
        for unit in ctx.units:
            arrived[unit] = arrived[unit] + g if unit in arrived else g
        return None, None, None, None


def deviation(matrix: Tensor, is_wide: bool) -> Tensor:
    """P P' - I of a wide P, P' P - I of a tall one, (r, r), fp32 at least."""
    P = _wide(matrix)
    G = P @ P.t() if is_wide else P.t() @ P
    G.diagonal().sub_(1)
    return G


def slope(matrix: Tensor, G: Tensor, factor: Tensor, is_wide: bool) -> Tensor:
    """`factor` times the product of the deviation G with P, in the dtype of P."""
    C, P = G * factor.to(G.device), _wide(matrix)
    return (C @ P if is_wide else P @ C).to(matrix.dtype)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
