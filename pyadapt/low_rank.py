"""A low-rank term beside a frozen layer's output: how every unit that comes down to two factors runs.

linear:        y = x W' + b + s drop(x) A' B',            A (r, K), B (N, r)
convolution:   y = W * x + b + s B * (A * drop(x)),       A (r, in, *kernel), B (out, r / groups, 1, ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dtypes import output_dtype, product_input
from .ops.lora import LoraLinear
from .ops.lora_rows import LoraRows
from .rows import Rows
from .seed import draw_seed

# Dimensions of the weight -> the convolution.
CONVOLUTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class LowRank(NamedTuple):
    """A term of a linear layer.

    Attributes:
        A: (r, K).
        B: (N, r).
        scaling: s.
        dropout: the probability p of drop() now: 0 outside training.
    """

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0


def linear(x: Tensor, term: LowRank, owner: Any, y: Tensor | None = None, with_bias: bool = True) -> Tensor:
    """The output of the adapted linear layer `owner` with `term` in it.

    Args:
        x: the layer's input, (..., K).
        term: the term.
        owner: an `AdaptedLayer`.
        y: None where the frozen product is to be computed as well, in one kernel; else the output so far, (..., N).
        with_bias: False leaves the layer's own bias out, where y is None.
    """
    A, B, scaling, p = term
    if y is not None:
        dropped = F.dropout(x, p) if p > 0 else x
        return y + (scaling * F.linear(F.linear(dropped.to(A.dtype), A), B)).to(y.dtype)
    x = product_input(x)
    seed = draw_seed(x) if p > 0 else None
    # A bias that is trained is added where autograd sees it.
    trained = owner.live_bias is not None
    y = LoraLinear.apply(x, A, B, owner, scaling, p, seed, output_dtype(x), with_bias and not trained)
    return y + owner.bias.to(y.dtype) if with_bias and trained else y


def linear_by_row(rows: Rows, terms: Sequence[LowRank], owner: Any, x: Tensor) -> Tensor:
    """The output of the linear layer `owner` with a term a row of the batch, in one kernel.

    Args:
        rows: which of `terms` serves which row; `rows.units` counts as they do.
        terms: one a unit.
        owner: an `AdaptedLayer`.
        x: the layer's input, (batch, ..., K).
    """
    x = product_input(x)
    dropouts = [term.dropout for term in terms]
    seed = draw_seed(x) if any(dropouts) else None
    matrices = [term.A for term in terms] + [term.B for term in terms]
    scalings = [term.scaling for term in terms]
    segments = rows.segments(x.shape[:-1].numel())
    return LoraRows.apply(x, owner, segments, scalings, dropouts, seed, output_dtype(x), *matrices)


def conv(x: Tensor, A: Tensor, B: Tensor, owner: Any, *, bias: Tensor | None = None, p: float = 0.0) -> Tensor:
    """B * (A * drop(x)) + bias in the dtype of A, with the geometry of the convolution `owner`: (batch, out, *size).

    A sees every input channel, also where the layer has groups; B has the layer's groups. Where x has to be dropped
    from or cast, that is done again in backward: only x itself is kept, once.
    """
    if (p > 0 or x.dtype != A.dtype) and torch.is_grad_enabled():
        hidden = checkpoint(reduce, x, A, p, owner, use_reentrant=False, preserve_rng_state=p > 0)
    else:
        hidden = reduce(x, A, p, owner)
    return CONVOLUTIONS[B.dim()](hidden, B, bias, groups=owner.groups)


def reduce(x: Tensor, A: Tensor, p: float, owner: Any) -> Tensor:
    """A * drop(x) with the geometry of the convolution `owner`, without its groups: (batch, r, *size)."""
    return conv_like((F.dropout(x, p) if p > 0 else x).to(A.dtype), A, owner)


def conv_like(x: Tensor, weight: Tensor, owner: Any, groups: int = 1) -> Tensor:
    """weight * x with the stride, padding, dilation and padding mode of the convolution `owner`."""
    padding = owner.padding
    if owner.padding_mode != "zeros":
        x = F.pad(x, owner._reversed_padding_repeated_twice, mode=owner.padding_mode)
        padding = 0
    return CONVOLUTIONS[weight.dim()](x, weight, None, owner.stride, padding, owner.dilation, groups)
