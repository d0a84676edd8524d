"""LoftQ: A and B start as the best low-rank answer to what quantising has taken from the weight.

    repeat loftq_iter times:   Q = quantise(W - s B A),   s B A = the first r terms of the SVD of W - Q

At first A = B = 0. The factors are U sqrt(S / s) and sqrt(S / s) V', so that Q + s B A is near W whatever the scaling.
(PEFT leaves s out, which is the same for lora_alpha = r only.) More than a few rounds gain little, and at 2 bits they
can lose.

Over a dense weight the weight itself becomes Q, by request: unwrapping leaves Q, and a second adapter has Q under it.
`loftq_bits` chooses what Q is:

    8       int8 rows: the layer becomes a layer of `pyadapt.quantize`, of half or a quarter of its size
    4, 2    NF4 and NF2, the normal float of QLoRA in blocks of 64, held in the layer's own dtype

Over a weight that is quantised already, `loftq_config["original"]` names the checkpoint of the model from before, of
which one weight is read at a time. Q is what the layer holds; with more than one iteration the layer is quantised
again, in its own storage. The adapter is then like any other, and its file says so.

Sources: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023; Dettmers et al.,
"QLoRA: Efficient Finetuning of Quantized LLMs", 2023 (normal float).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base import BaseWeight, base_of
from ...base.int8 import Int8, make_int8
from ...distributed.sharding import replacing, whole
from ...integrations.transformers import QUANT_METHOD
from ...layer import AdaptedLayer
from ...method import Preparation
from ...originals import OriginalWeights
from .inits import INITS, Init, start_kaiming
from .spectral import balanced, check_weight_and_scaling, top_singular

if TYPE_CHECKING:
    from ...planning import Plan
    from .config import LoraConfig
    from .unit import LoraUnit

# Quantises a matrix (N, K) and gives back what the quantised values stand for, in fp32.
Quantiser = Callable[[Tensor], Tensor]
# A and B.
Factors = tuple[Tensor, Tensor]

DEFAULTS = {"loftq_bits": 4, "loftq_iter": 1}
BITS = (2, 4, 8)
ORIGINAL = "original"
# Values that share a scale in NF4 and NF2.
BLOCK = 64
# The largest probability whose quantile is a value of the normal float; the QLoRA authors' choice.
TOP_QUANTILE = 0.9677083


def complete_loftq(config: LoraConfig) -> None:
    """Fill in `loftq_config`, whose values are checked.

    Raises:
        ValueError: it is missing, or has an unknown key or value.
    """
    given = config.loftq_config
    if not given:
        raise ValueError(
            'init_lora_weights="loftq" needs loftq_config: {"loftq_bits": 2, 4 or 8, "loftq_iter": 1}, and over '
            f'quantised weights {{"{ORIGINAL}": the folder that they were quantised from}}'
        )
    given = dict(given if isinstance(given, Mapping) else vars(given))
    unknown = given.keys() - {*DEFAULTS, ORIGINAL}
    if unknown:
        raise ValueError(
            f"loftq_config has no {', '.join(map(repr, sorted(unknown)))}; known are {', '.join([*DEFAULTS, ORIGINAL])}"
        )
    config.loftq_config = {**DEFAULTS, **given}
    bits, rounds = config.loftq_config["loftq_bits"], config.loftq_config["loftq_iter"]
    if bits not in BITS:
        raise ValueError(f"loftq_bits={bits!r} is not one of {', '.join(map(str, BITS))}")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"loftq_iter={rounds!r}: a whole number of at least 1 is needed")


def fit(W: Tensor, r: int, s: float, rounds: int, quantise: Quantiser) -> tuple[Factors, Factors | None]:
    """The factors (A (r, K), B (N, r)) that LoftQ ends with, and those of the round before, which Q was made with.

    Args:
        W: the weight (N, K) in fp32.
        r: rank.
        s: scaling.
        rounds: `loftq_iter`.
        quantise: gives Q; called once a round.
    """
    factors, before = None, None
    for _ in range(rounds):
        before = factors
        U, S, Vh = top_singular(W - quantise(target(W, s, before)), r)
        factors = balanced(U, S / s, Vh)
    assert factors is not None
    return factors, before


def target(W: Tensor, s: float, factors: Factors | None) -> Tensor:
    """What is quantised: W less what the factors (A, B) answer for."""
    return W if factors is None else W - s * (factors[1] @ factors[0])


def int8_values(matrix: Tensor) -> Tensor:
    """`matrix` (N, K) as its int8 rows stand for."""
    return torch.ops.pyadapt.dequantize_rows(*torch.ops.pyadapt.quantize_rows(_as_fp16(matrix)), torch.float32)


def normal_float_values(matrix: Tensor, bits: int) -> Tensor:
    """`matrix` rounded to the normal float of 2 or 4 bits: blocks of 64 in row order, each over its largest value."""
    levels = _normal_float(bits).to(matrix.device)
    flat = matrix.float().flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    peak = blocks.abs().amax(dim=1, keepdim=True)
    # As bitsandbytes rounds: a product with the reciprocal.
    scaled = blocks * (1 / peak.clamp(min=torch.finfo(torch.float32).tiny))
    nearest = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * peak).flatten()[: len(flat)].view_as(matrix)


@lru_cache
def _normal_float(bits: int) -> Tensor:
    """The values of the normal float, sorted: zero, and quantiles of the normal distribution scaled to [-1, 1].

    There is one more above zero than below.
    """
    half = 2 ** (bits - 1)
    positive, negative = (
        torch.special.ndtri(torch.linspace(TOP_QUANTILE, 0.5, count + 1, dtype=torch.float64)[:-1])
        for count in (half, half - 1)
    )
    values = torch.cat([positive, torch.zeros(1, dtype=torch.float64), -negative]).sort().values
    return (values / positive[0]).float()


def _as_fp16(matrix: Tensor) -> Tensor:
    # PEFT quantises what fp16 holds of a weight; so do we, and A and B of its files fit the same int8 values.
    return matrix.half().float()


# --- over dense weights -----------------------------------------------------------------------------------------------


def _start_loftq(unit: LoraUnit, config: LoraConfig, base: type[BaseWeight], layer: Any) -> None:
    """Fit A and B; the layer changes when all units are made. Over a quantised layer they are put in by `prepare`."""
    unit.fits_quantization = True
    if base.quantized:
        start_kaiming(unit)
        return
    bits, rounds = config.loftq_config["loftq_bits"], config.loftq_config["loftq_iter"]
    own_A, own_B = unit.parameters_of_factors()
    quantise = _quantiser(bits, base.dtype(layer))
    with whole(layer, [layer]):
        matrix = base.matrix(layer)
    (A, B), before = fit(matrix, own_A.shape[0], unit.scaling, rounds, quantise)
    own_A.copy_(A)
    own_B.copy_(B)
    unit.change_layer = partial(_quantise_layer, base, layer, bits, unit.scaling, before)


def _quantiser(bits: int, dtype: torch.dtype) -> Quantiser:
    if bits == 8:
        return int8_values
    # Rounded as it will be stored, so that A and B answer for that too.
    return lambda matrix: normal_float_values(matrix, bits).to(dtype).float()


def _quantise_layer(base: type[BaseWeight], layer: Any, bits: int, s: float, factors: Factors | None) -> None:
    with replacing(layer) if bits == 8 else whole(layer, [layer], write=True):
        matrix = target(base.matrix(layer), s, factors)
        if bits == 8:
            make_int8(layer)
            Int8.assign(layer, _as_fp16(matrix))
        else:
            base.assign(layer, normal_float_values(matrix, bits))


def _check_loftq(config: LoraConfig, model: nn.Module, path: str, base: type[BaseWeight], layer: Any) -> None:
    check_weight_and_scaling(config, model, path, base, layer)
    if base.quantized:
        return
    if isinstance(layer, AdaptedLayer):
        raise ValueError("it would quantise the weight under the adapters that are on it already; wrap with it first")
    method = getattr(model, "quantization_method", None)
    method = getattr(method, "value", method)
    if config.loftq_config["loftq_bits"] == 8 and method not in (None, QUANT_METHOD):
        raise ValueError(
            f"a model quantised by {method} cannot also have int8 layers; loftq_bits=4 keeps this one dense"
        )
    sharing = [
        other
        for other, module in model.named_modules()
        if module is not layer and any(parameter is layer.weight for parameter in module.parameters(recurse=False))
    ]
    if sharing:
        raise ValueError(f"it would quantise the weight of {', '.join(sharing)}, which is the same; leave this one out")


INITS["loftq"] = Init(_start_loftq, _check_loftq, complete_loftq, moves=True)


# --- over quantised weights -------------------------------------------------------------------------------------------


def prepare(plan: Plan, model: nn.Module) -> Preparation:
    """Fit A and B of the planned layers that are quantised to the original weights; nothing is changed yet.

    Raises:
        ValueError: layers are quantised and `loftq_config` names no original, or it holds a NaN or an infinity.
        AdapterFileError: the original has not the weights.
    """
    config: LoraConfig = plan.config
    options = dict(config.loftq_config)
    original, rounds = options.pop(ORIGINAL, None), options["loftq_iter"]
    # Where the original lies is no part of the adapter.
    plan = replace(plan, config=config.replaced(loftq_config=options))
    layers = {row.path: model.get_submodule(row.path) for row in plan.layers}
    quantised = {path: layer for path, layer in layers.items() if _kind(layer).quantized}
    if not quantised:
        return Preparation(plan)
    if original is None:
        raise ValueError(
            f"{next(iter(quantised))} is quantised already, and LoftQ needs its weight from before: "
            f'loftq_config={{"{ORIGINAL}": the folder or safetensors file}}'
        )
    originals = OriginalWeights(original, model)
    values: dict[str, dict[str, Tensor]] = {}
    changes: list[Callable[[], None]] = []
    for path, layer in quantised.items():
        if rounds > 1 and isinstance(layer, AdaptedLayer):
            raise ValueError(f"{path} carries adapters, and loftq_iter={rounds} would change it under them; use 1")
        s = config.scaling_of(path)
        factors, before = fit_to_original(originals, path, layer, config.rank_of(path), s, rounds)
        values[path] = dict(zip(("lora_A", "lora_B"), factors, strict=True))
        if before is not None:
            changes.append(partial(_quantise_again, originals, path, layer, s, before))
    if len(quantised) == len(layers):
        plan = replace(plan, config=config.replaced(init_lora_weights=True, loftq_config={}))
    return Preparation(plan, values, lambda: [change() for change in changes])


def fit_to_original(
    originals: OriginalWeights, path: str, layer: Any, r: int, s: float, rounds: int
) -> tuple[Factors, Factors | None]:
    W = _read(originals, path, layer)
    if not bool(torch.isfinite(W).all()):
        raise ValueError(f"the original weight of {path} holds a NaN or an infinity")
    # Quantised again and again, and put back: what is written is not to be kept.
    with torch.no_grad(), whole(layer, [layer], write=rounds > 1):
        return fit(W, r, s, rounds, _Requantiser(layer))


def _quantise_again(originals: OriginalWeights, path: str, layer: Any, s: float, factors: Factors) -> None:
    with whole(layer, [layer], write=True):
        _kind(layer).assign(layer, target(_read(originals, path, layer), s, factors))


def _read(originals: OriginalWeights, path: str, layer: Any) -> Tensor:
    device = next(iter(_kind(layer).stored(layer).values())).device
    return originals.matrix(path, layer, _kind(layer)).to(device)


class _Requantiser:
    """Tells what a quantised layer would stand for: at first as it is, then after another matrix was assigned to it."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._base, self._as_is = layer, _kind(layer), True

    def __call__(self, matrix: Tensor) -> Tensor:
        if self._as_is:
            self._as_is = False
            return self._base.matrix(self._layer)
        kept = self._base.keep(self._layer)
        try:
            self._base.assign(self._layer, matrix)
            return self._base.matrix(self._layer)
        finally:
            self._base.put_back(self._layer, kept)


def _kind(layer: Any) -> type[BaseWeight]:
    base = base_of(layer)
    assert base is not None
    return base
