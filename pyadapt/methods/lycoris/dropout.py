"""Dropout of what a LoHa or LoKr adapter adds: whole output features, or all of a layer's at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.philox import keep_mask
from ...seed import draw_seed


def output_factors(
    x: Tensor, features: int, rank_dropout: float, module_dropout: float, rescale: bool
) -> Tensor | None:
    """What each output feature of the adapter's term is multiplied by in this step, (features,) fp32; None for ones.

    The masks are counter-based, as LoRA's: a seed from torch's generator, whose state gradient checkpointing restores.
    Row 0 of the mask is for the features, the first element of row 1 for the whole.

    Args:
        x: the layer's input, for its device.
        features: N.
        rank_dropout: probability that a feature is dropped.
        module_dropout: probability that all are.
        rescale: divide by the share of the features that were kept (all that PEFT calls a mean), not by 1 - p.
    """
    if rank_dropout == 0 and module_dropout == 0:
        return None
    seed = draw_seed(x)
    factors = torch.ones(features, dtype=torch.float32, device=x.device)
    if rank_dropout > 0:
        factors = factors * keep_mask(seed, rank_dropout, 1, features, x.device)[0]
        if rescale:
            # Where none is kept there is nothing to stretch; 0 / 0 would be a NaN.
            factors = factors * (features / factors.sum().clamp(min=1))
    if module_dropout > 0:
        factors = factors * keep_mask(seed, module_dropout, 2, 1, x.device)[1]
    return factors
