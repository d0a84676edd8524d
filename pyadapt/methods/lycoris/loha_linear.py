"""LoHa on a linear layer: a LoRA of rank r^2, or from some rank on a product with panels of dW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import low_rank
from ...base import BaseWeight
from ...dtypes import output_dtype, product_input
from ...layer import AdaptedLayer
from ...low_rank import LowRank
from ...method import product_route
from ...ops.loha import KhatriRao, TiledHadamard, low_rank_dtype
from .loha import LoHa, LoHaConfig, LoHaUnit

# Where the tiled form is faster, forward and backward: the Khatri-Rao form costs as r^2 (N + K) M, the tiled one as
# N K (M + TILED_ROWS), the rows being what forming dW costs. Measured on a CPU with AVX-512 and bf16 instructions,
# times over the frozen layer, Khatri-Rao / tiled:
#   (M, K, N)           r=8          r=16         r=24         r=32
#   512, 2048, 2048     1.17 / 3.27  1.50 / 3.33  2.03 / 3.48  2.82 / 3.58   bf16
#   2048, 1024, 1024    1.30 / 2.86  1.92 / 2.89  3.02 / 2.87  4.53 / 2.97   bf16
#   1024, 2048, 5504    1.09 / 2.99  1.33 / 3.09  1.67 / 3.13  2.16 / 3.17   bf16
#   512, 2048, 2048     1.06 / 1.83  1.30 / 1.78  1.79 / 1.85                fp32
#   2048, 1024, 1024    1.18 / 1.45  1.70 / 1.44  2.59 / 1.55                fp32
TILED_SHARE, TILED_SHARE_BF16, TILED_ROWS = 0.4, 0.85, 256


def is_tiled(rows: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether the tiled form serves a step on `rows` rows of x in `dtype`."""
    share = TILED_SHARE_BF16 if dtype == torch.bfloat16 else TILED_SHARE
    formed = share * out_features * in_features * (rows + TILED_ROWS)
    return rank**2 * (out_features + in_features) * rows > formed


class LinearUnit(LoHaUnit):
    """LoHa on y = x W' + b."""

    @classmethod
    def route(cls, config: LoHaConfig, path: str, base: type[BaseWeight], layer: Any, tokens: int) -> str:
        """See `AdapterUnit.route`."""
        rank = config.rank_of(path)
        if is_tiled(tokens, *base.shape(layer), rank, base.dtype(layer)):
            return "tiled"
        return f"khatri-rao, {product_route(base, layer, tokens, rank**2)}"

    def low_rank(self) -> LowRank | None:
        """See `AdapterUnit.low_rank`; the factors hold the dropped rows of this step."""
        w1a, w1b, w2a, w2b = self.matrices()
        dtype = torch.promote_types(w1a.dtype, torch.float32)
        A, B = KhatriRao.apply(w1a, w1b, w2a, w2b, self.output_factors(w1a, w1a.shape[0]), self.scaling, dtype)
        return LowRank(A, B, 1.0)

    def forward(self, x: Tensor, owner: AdaptedLayer, y: Tensor | None = None) -> Tensor:
        """See `AdapterUnit.forward`."""
        w1a, w1b, w2a, w2b = self.matrices()
        (out_features, rank), in_features = w1a.shape, w1b.shape[1]
        factors = self.output_factors(x, out_features)
        rows = x.numel() // in_features
        if not is_tiled(rows, out_features, in_features, rank, x.dtype):
            A, B = KhatriRao.apply(w1a, w1b, w2a, w2b, factors, self.scaling, low_rank_dtype(x))
            return low_rank.linear(x, LowRank(A, B, 1.0), owner, y)
        x = product_input(x)
        trained = y is None and owner.live_bias is not None
        dtype = output_dtype(x) if y is None else y.dtype
        out = TiledHadamard.apply(x, w1a, w1b, w2a, w2b, factors, y, owner, self.scaling, dtype, not trained)
        # A bias that is trained is added where autograd sees it.
        return out + owner.bias.to(out.dtype) if trained else out


LoHa.units["linear"] = LinearUnit
