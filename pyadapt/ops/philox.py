"""The dropout mask: Philox4x32-10, a pure function of (seed, row, column).

Nothing of a mask is ever saved: forward and backward make the same bits again from the seed. This is the plain-torch
reference; ``csrc/core/philox.hpp`` gives the same bits. (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011.)

    counter = (k // 4, m mod 2^32, m // 2^32, 0),  key = (seed mod 2^32, seed // 2^32)
    element (m, k) is kept when lane k mod 4 of philox(counter, key) >= round(p 2^32)
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; int64 wraps, so its 64 bits are those of the unsigned product."""
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds of Philox4x32 over int64 tensors that hold 32-bit words; they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(_MULTIPLIER_0, c0)
        high1, low1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """A 32-bit draw below this is dropped: round(p 2^32), so p = 0 keeps all and p = 1 drops all."""
    return round(p * 2**32)


def survivor_scale(p: float) -> float:
    """1 / (1 - p), and 0 where nothing survives."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def keep_mask(seed: Tensor, p: float, M: int, K: int, device: torch.device | str = "cpu") -> Tensor:
    """The boolean (M, K) mask of kept elements for a one-element int64 seed."""
    seed = seed.reshape(()).to(device)
    key = (seed & _LOW, (seed >> 32) & _LOW)
    group = torch.arange((K + 3) // 4, device=device)[None, :]
    row = torch.arange(M, device=device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    lanes = philox4x32((group, row & _LOW, row >> 32, zero), key)
    groups = group.shape[1]
    draws = torch.stack([lane.expand(M, groups) for lane in lanes], dim=-1).reshape(M, 4 * groups)
    return draws[:, :K] >= threshold(p)


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """drop(x) for x (M, K): kept values times 1 / (1 - p). p = 0 returns x itself and needs no seed."""
    if p == 0.0:
        return x
    if not 0.0 < p <= 1.0:
        raise ValueError(f"dropout_p is {p}; it must lie in [0, 1]")
    if seed is None:
        raise ValueError(f"dropout_p is {p}, but no seed was given: pass an int64 tensor of one element")
    kept = keep_mask(seed, p, x.shape[0], x.shape[1], x.device)
    # where, not a product: a dropped NaN or Inf is dropped.
    return torch.where(kept, x * survivor_scale(p), torch.zeros((), dtype=x.dtype, device=x.device))
