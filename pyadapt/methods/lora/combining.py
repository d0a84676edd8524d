"""Combining LoRA adapters into a new one: weighted sums of task tensors, with or without pruning and sign election.

A task tensor t_i is what adapter i adds. It is either each factor by itself (A_i and B_i), or the whole delta
s_i B_i A_i, which a truncated SVD splits into factors again (the kinds that end in `svd`). With w_i the weights:

    linear, svd           sum_i w_i t_i
    cat                   A = [w_i s_i A_i], B = [B_i] stacked along the rank: exact
    magnitude_prune       sum_i w_i m_i t_i         m_i keeps the `density` largest of |t_i|
    dare_linear           sum_i w_i m_i t_i / density             m_i ~ Bernoulli(density)
    ties                  sum_i w_i c_i m_i t_i / max(1, sum_i c_i)   c_i: m_i t_i has the elected sign, m_i as above
    dare_ties             the same of m_i t_i / density, with the random m_i

Over factors w_i becomes sign(w_i s_i) sqrt|w_i s_i| on A and sqrt|w_i s_i| on B, so that the product carries w_i s_i
once; the scaling of the new adapter is 1 everywhere. Names, order of the random draws and results are those of PEFT.

Sources: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023; Yu et al., "Language Models are
Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch" (DARE), 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAJORITY_SIGN_METHODS = ("total", "frequency")
SVD_DRIVERS = ("gesvd", "gesvdj", "gesvda")


class Arithmetic(NamedTuple):
    """What is done to task tensors: how they are pruned (None: not at all), and whether they elect a sign."""

    pruning: str | None = None
    elects: bool = False


KINDS: dict[str, Arithmetic] = {
    "linear": Arithmetic(),
    "cat": Arithmetic(),
    "svd": Arithmetic(),
    "ties": Arithmetic("magnitude", elects=True),
    "ties_svd": Arithmetic("magnitude", elects=True),
    "dare_linear": Arithmetic("random"),
    "dare_linear_svd": Arithmetic("random"),
    "dare_ties": Arithmetic("random", elects=True),
    "dare_ties_svd": Arithmetic("random", elects=True),
    "magnitude_prune": Arithmetic("magnitude"),
    "magnitude_prune_svd": Arithmetic("magnitude"),
}


@dataclass
class Combination:
    """Which adapters are combined and how, checked when made.

    Attributes:
        adapters: names of the adapters.
        weights: one number an adapter; negative ones subtract.
        combination_type: one of `KINDS`; a single adapter is always combined by "linear", as in PEFT.
        svd_rank: rank of the result of the svd kinds; None is the largest rank among the adapters.
        svd_clamp: quantile, in (0, 1], of the values of both SVD factors, beyond which they are clamped.
        svd_driver: cuSOLVER's method, one of `SVD_DRIVERS`; for adapters on CUDA.
        density: share of the elements that pruning keeps, in (0, 1].
        majority_sign_method: whether an element's sign is elected by the sum of its values ("total") or by their
            number ("frequency"). Weights have no vote.

    Raises:
        ValueError: a value that is out of range, missing or of the wrong length.
        TypeError: `adapters` is one string.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        self._check_adapters()
        if self.combination_type not in KINDS:
            raise ValueError(f"combination_type={self.combination_type!r} is not one of {', '.join(KINDS)}")
        if len(self.adapters) == 1:
            self.combination_type = "linear"
        self._check_pruning()
        self._check_svd()

    def _check_adapters(self) -> None:
        if isinstance(self.adapters, str):
            raise TypeError(f"adapters={self.adapters!r} is a string, not a list of names; write [{self.adapters!r}]")
        if not self.adapters:
            raise ValueError("adapters is empty; name at least one adapter to combine")
        if len(self.weights) != len(self.adapters):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {len(self.adapters)} adapters "
                f"({', '.join(self.adapters)}); give one for each"
            )
        for name, weight in zip(self.adapters, self.weights, strict=True):
            if not math.isfinite(weight):
                raise ValueError(f"the weight of adapter {name!r} is {weight}; give a finite number")

    def _check_pruning(self) -> None:
        if self.density is None:
            if self.arithmetic.pruning is not None:
                raise ValueError(
                    f"combination_type={self.combination_type!r} prunes and needs density, the share of the elements "
                    "to keep, in (0, 1]; 0.5 keeps half"
                )
        elif not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r} is not in (0, 1]; it is the share of the elements to keep")
        if self.majority_sign_method not in MAJORITY_SIGN_METHODS:
            methods = ", ".join(MAJORITY_SIGN_METHODS)
            raise ValueError(f"majority_sign_method={self.majority_sign_method!r} is not one of {methods}")

    def _check_svd(self) -> None:
        rank = self.svd_rank
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(
                f"svd_rank={rank!r}: a rank is a whole number of at least 1; None takes the adapters' largest"
            )
        if self.svd_clamp is not None and not 0 < self.svd_clamp <= 1:
            raise ValueError(f"svd_clamp={self.svd_clamp!r} is not in (0, 1]; it is a quantile, None does not clamp")
        if self.svd_driver is not None and self.svd_driver not in SVD_DRIVERS:
            raise ValueError(
                f"svd_driver={self.svd_driver!r} is not one of {', '.join(SVD_DRIVERS)}; None lets torch choose"
            )

    @property
    def arithmetic(self) -> Arithmetic:
        """What is done to the task tensors."""
        return KINDS[self.combination_type]

    @property
    def over_deltas(self) -> bool:
        """Whether whole deltas are combined (`combine_deltas`), and not factors (`combine_factors`)."""
        return self.combination_type.endswith("svd")

    def rank_of(self, ranks: Sequence[int]) -> int:
        """The rank of the new adapter.

        Args:
            ranks: the rank of each adapter; where ranks differ by layer, the largest.

        Raises:
            ValueError: the ranks differ and the kind adds factors element by element.
        """
        if self.combination_type == "cat":
            return sum(ranks)
        if self.over_deltas:
            return self.svd_rank or max(ranks)
        if len(set(ranks)) != 1:
            raise ValueError(
                f"combination_type={self.combination_type!r} adds the adapters' factors and needs equal ranks, not "
                f"{list(ranks)}; combination_type='cat' and the svd kinds take any"
            )
        return ranks[0]


def prune_by_magnitude(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with all but its `density` share of largest absolute values (rounded down in number) set to zero."""
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter_(0, kept, flat[kept]).view(tensor.shape)


def prune_at_random(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with each element kept with probability `density`, and what is kept divided by it.

    Draws one mask from the generator of the tensor's device, row by row of its shape, in the tensor's dtype.
    """
    mask = torch.bernoulli(torch.full_like(tensor, density))
    return tensor * mask / density


def has_majority_sign(tensors: Tensor, method: str) -> Tensor:
    """Which elements have the sign that their place has elected; a draw elects +, zeros never have it.

    Args:
        tensors: (n, ...), one task tensor a row.
        method: see `Combination.majority_sign_method`.

    Returns:
        Boolean, (n, ...).
    """
    votes = tensors if method == "total" else tensors.sign()
    positive = votes.sum(dim=0) >= 0
    return torch.where(positive, tensors > 0, tensors < 0)


def merge_task_tensors(tensors: Sequence[Tensor], weights: Sequence[float], combination: Combination) -> Tensor:
    """The weighted sum of task tensors of one shape, pruned and elected as the combination says.

    Returns:
        The shape of one; fp32, or fp64 for fp64 tensors.
    """
    pruning, elects = combination.arithmetic
    density = combination.density
    # A density of 1 keeps all, and draws nothing.
    if pruning is not None and density is not None and density < 1:
        prune = prune_by_magnitude if pruning == "magnitude" else prune_at_random
        tensors = [prune(tensor, density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    wide = torch.promote_types(stacked.dtype, torch.float32)
    weighting = torch.tensor(weights, dtype=wide, device=stacked.device)
    weighted = stacked * weighting.view(-1, *[1] * (stacked.dim() - 1))
    if not elects:
        return weighted.sum(dim=0)
    elected = has_majority_sign(stacked, combination.majority_sign_method)
    return (weighted * elected).sum(dim=0) / elected.sum(dim=0).clamp(min=1)


@torch.no_grad()
def combine_factors(
    pairs: Sequence[tuple[Tensor, Tensor]],
    scalings: Sequence[float],
    weights: Sequence[float],
    combination: Combination,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """A and B of the new adapter on one layer, by the kinds that combine factors.

    Args:
        pairs: A (r, K...) and B (N, r, ...) of each adapter that the layer has, in the order of the combination.
        scalings: the factor s of each of these.
        weights: the weight of each of these.
        combination: one that is not `over_deltas`.
        rank: of the result, R; what the pairs do not fill is zero.

    Returns:
        A (R, K...) and B (N, R, ...) for a scaling of 1, in the dtype of the first pair.

    Raises:
        ValueError: the pairs differ in rank, and the kind is not "cat".
    """
    factors_A, factors_B = [A for A, _ in pairs], [B for _, B in pairs]
    if combination.combination_type == "cat":
        scaled = [A * weight * s for A, weight, s in zip(factors_A, weights, scalings, strict=True)]
        A, B = torch.cat(scaled), torch.cat(factors_B, dim=1)
    else:
        combination.rank_of([len(A) for A in factors_A])
        shares = [weight * s for weight, s in zip(weights, scalings, strict=True)]
        roots = [math.sqrt(abs(share)) for share in shares]
        signed = [math.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
        A = merge_task_tensors(factors_A, signed, combination)
        B = merge_task_tensors(factors_B, roots, combination)
    return _pad(A.to(factors_A[0].dtype), B.to(factors_B[0].dtype), rank)


@torch.no_grad()
def delta(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """s B A of A (r, K...) and B (N, r, ...) as a matrix (N, K).

    It is rounded to the dtype of B, as in PEFT: pruning by magnitude may hang on values that rounding makes equal.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    product = B.flatten(1).to(wide) @ A.flatten(1).to(wide)
    return (product * scaling).to(B.dtype)


@torch.no_grad()
def combine_deltas(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    combination: Combination,
    rank: int,
    *,
    stored_transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """A and B of the new adapter on one layer, by the kinds that combine deltas: the best of rank R in Frobenius norm.

    Args:
        deltas: `delta` (N, K) of each adapter that the layer has, in the order of the combination.
        weights: the weight of each of these.
        combination: one that is `over_deltas`.
        rank: of the result, R; what exceeds min(N, K) is zero.
        stored_transposed: whether the layer stores its weight as (K, N), as `Conv1D` and embeddings do: masks are drawn
            in the order of the stored weight.

    Returns:
        A (R, K) and B (N, R) for a scaling of 1; fp32, or fp64 for fp64 deltas. B carries the singular values.
    """
    if stored_transposed:
        merged = merge_task_tensors([matrix.t() for matrix in deltas], weights, combination).t()
    else:
        merged = merge_task_tensors(deltas, weights, combination)
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False, driver=combination.svd_driver)
    A, B = Vh[:rank], U[:, :rank] * S[:rank]
    if combination.svd_clamp is not None:
        limit = torch.cat([B.flatten(), A.flatten()]).quantile(combination.svd_clamp)
        A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
    return _pad(A, B, rank)


def _pad(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B with zeros up to `rank`; the product stays."""
    missing = rank - A.shape[0]
    return F.pad(A, (0, 0) * (A.dim() - 1) + (0, missing)), F.pad(B, (0, 0) * (B.dim() - 2) + (0, missing))
