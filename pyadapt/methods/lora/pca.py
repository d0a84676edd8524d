"""Principal components of rows that arrive in batches.

The components so far, each times its singular value, stand for all rows before: the SVD of them, the new centred rows
and a row for the shift of the mean gives the components of all rows (up to those that were cut off).

Source: Ross et al., "Incremental Learning for Robust Visual Tracking", 2008. The SVD is the approximate one of Halko et
al., 2009, from a fixed seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

SVD_SEED = 42
SVD_ROUNDS = 4


class IncrementalPca:
    """The first `count` principal components of the rows that `update` was given.

    Attributes:
        components: (count, K), in order; None before the first update.
        singular_values: (count,).
        explained: (count,), the share of the variance of all rows that each component explains.
        still: (count,) bool, whether the last update left a component where it was.

    Args:
        count: number of components, at most K.
        tau: cosine similarity from which a component counts as having stayed.
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau = count, tau
        self.rows = 0
        self.components: Tensor | None = None
        self.singular_values = self.explained = torch.empty(0)
        self.still = torch.zeros(count, dtype=torch.bool)

    def update(self, x: Tensor) -> None:
        """Add the rows of `x` (M, K) in fp32, at least `count` of them."""
        before = self.components
        mean = x.mean(0)
        # Sums of squares around the mean, in fp64 as they run over all batches.
        moments = (x - x.sum(0, dtype=torch.float64) / len(x)).square().sum(0, dtype=torch.float64)
        total = self.rows + len(x)
        if before is None:
            self._mean, self._moments = x.mean(0, dtype=torch.float64), moments
            stacked = x - self._mean.to(x.dtype)
        else:
            shift = self._mean - mean
            weight = self.rows * len(x) / total
            stacked = torch.vstack([self.singular_values[:, None] * before, x - mean, weight**0.5 * shift])
            exact_mean = x.mean(0, dtype=torch.float64)
            self._moments = self._moments + moments + weight * (self._mean - exact_mean).square()
            self._mean = (self._mean * self.rows + exact_mean * len(x)) / total
        self.rows = total
        S, Vh = _singular(stacked, self.count)
        # The sign of a component is free: its largest element is made positive.
        largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
        self.components, self.singular_values = Vh * largest.sign(), S
        self.explained = S.square() / self._moments.sum()
        if before is not None:
            self.still = torch.cosine_similarity(self.components, before) >= self.tau


def _singular(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest singular values of `x` and their right vectors (count, K)."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(SVD_SEED)
        _, S, V = torch.svd_lowrank(x, q=min(2 * count, *x.shape), niter=SVD_ROUNDS)
    return S[:count], V.mH[:count]
