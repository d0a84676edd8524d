"""Starting from the layer's own weight: PiSSA and OLoRA.

With W = U diag(S) V' and the first r of each, or W = Q R:

    pissa    B0 = U sqrt(S / s),   A0 = sqrt(S / s) V'        olora    B0 = Q[:, :r],   A0 = R[:r]

The layer then computes x (W - s B0 A0)' + s x A' B', which is x W' at first. W itself is not touched: the unit keeps A0
and B0 beside A and B, so that W loses nothing to rounding, and disabling or removing the adapter gives the base model.
The start is worked out again from W when a file is loaded, as PEFT does. The fast SVD of "pissa_niter_<n>" is the same
each time here; PEFT draws another one, so that its own files of that kind are met as nearly as n rounds converge.

Over a quantised weight, W is what the quantised values stand for. The layer starts from just that: its error of
quantisation is neither larger nor smaller than before. (QPiSSA quantises W - s B0 A0 instead; LoftQ is the way to a
start with a smaller error.)

Sources: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", 2024;
Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...distributed.sharding import whole
from .inits import INITS, Init

if TYPE_CHECKING:
    from ...base import BaseWeight
    from .config import LoraConfig
    from .unit import LoraUnit

# Of the random start of a fast SVD: one seed, so that a file that is loaded again starts from the same A0 and B0.
FAST_SVD_SEED = 0


def top_singular(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular values (r,) of `matrix` (N, K), with their vectors: U (N, r), S, V' (r, K)."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def balanced(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with B A = U diag(S) V' and the root of S on either side."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def check_weight(config: LoraConfig, model: nn.Module, path: str, base: type[BaseWeight], layer: Any) -> None:
    """Refuse a weight that cannot be factored: too small for the rank, not here, or not finite."""
    r, (n, k) = config.rank_of(path), base.shape(layer)
    if r > min(n, k):
        raise ValueError(f"rank {r} is more than a {n} x {k} weight has; at most {min(n, k)} is possible")
    with whole(layer, [layer]):
        weight = next(iter(base.stored(layer).values()))
        if weight.is_meta or weight.numel() == 0:
            raise RuntimeError("its weight has no values here; load and wrap the model before it is offloaded")
        if not base.quantized and not all(map(torch.isfinite, torch.aminmax(weight.detach()))):
            raise ValueError("its weight holds a NaN or an infinity")


def check_weight_and_scaling(
    config: LoraConfig, model: nn.Module, path: str, base: type[BaseWeight], layer: Any
) -> None:
    """As `check_weight`; and the scaling, whose root divides the factors, must be positive."""
    if config.scaling_of(path) <= 0:
        raise ValueError(f"the scaling is {config.scaling_of(path)}; a positive lora_alpha is needed")
    check_weight(config, model, path, base, layer)


def _start_pissa(unit: LoraUnit, config: LoraConfig, base: type[BaseWeight], layer: Any) -> None:
    matrix, r = _matrix(base, layer), unit.parameters_of_factors()[0].shape[0]
    _, fast, rounds = str(config.init_lora_weights).rpartition("_niter_")
    U, S, Vh = _fast_svd(matrix, r, int(rounds)) if fast else top_singular(matrix, r)
    _start_from(unit, *balanced(U, S / unit.scaling, Vh))


def _start_olora(unit: LoraUnit, config: LoraConfig, base: type[BaseWeight], layer: Any) -> None:
    r = unit.parameters_of_factors()[0].shape[0]
    Q, R = torch.linalg.qr(_matrix(base, layer))
    _start_from(unit, R[:r], Q[:, :r])


def _matrix(base: type[BaseWeight], layer: Any) -> Tensor:
    with whole(layer, [layer]):
        return base.matrix(layer)


def _fast_svd(matrix: Tensor, r: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """An approximation of `top_singular` by `rounds` subspace iterations (Halko et al., 2009)."""
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(FAST_SVD_SEED)
        U, S, V = torch.svd_lowrank(matrix, r, niter=rounds)
    return U, S, V.t()


def _start_from(unit: LoraUnit, A: Tensor, B: Tensor) -> None:
    """Let A and B start so, and be taken out of W."""
    own_A, own_B = unit.parameters_of_factors()
    own_A.copy_(A)
    own_B.copy_(B)
    # What the parameters hold, which may be rounded: at first the two terms then cancel exactly.
    unit.start_A, unit.start_B = own_A.detach().clone(), own_B.detach().clone()


INITS["pissa"] = Init(_start_pissa, check_weight_and_scaling, moves=True)
INITS["pissa_niter_<n>"] = Init(_start_pissa, check_weight_and_scaling, moves=True)
INITS["olora"] = Init(_start_olora, check_weight, moves=True)
