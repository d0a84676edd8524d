"""LoRA on parameters that a module keeps itself: the experts of a mixture, a router.

    W[e] + s B[e] A[e],   W (E, n, k), e = 0 .. E - 1, or a single W (n, k)

As in PEFT's files A is (r E, in), its rows expert by expert, and B (out, r E), its columns rank by rank; out and in are
n and k, or k and n where the module's `is_transposed` says that it multiplies x W[e].

The module's own forward runs, with a `WeightSum` in the place of each adapted parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...base import BaseWeight
from ...base.experts import Experts, parts
from ...layer import AdaptedLayer
from ...targets import targeted_parameters
from .config import LoraConfig
from .unit import LoraUnit, adapts
from .weight_sum import WeightSum

# transformers' ways to run experts that are plain torch; others hand the weights to kernels of their own, which need
# tensors. A module that has no such choice is taken to be plain torch.
PLAIN_TORCH = (None, "eager", "batched_mm", "grouped_mm")


class NestedKeys(dict[str, str]):
    """Attribute -> file key: PEFT nests a wrapper a parameter, so `base_layer_lora_A` is `base_layer.lora_A.weight`."""

    def __missing__(self, attribute: str) -> str:
        return attribute.replace("base_layer_", "base_layer.") + ".weight"


def _start_kaiming(factor: Tensor, r: int) -> None:
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def _start_gaussian(factor: Tensor, r: int) -> None:
    nn.init.normal_(factor, std=1 / r)


def _start_zero(factor: Tensor, r: int) -> None:
    nn.init.zeros_(factor)


Start = Callable[[Tensor, int], None]

# How A and B start; the other ways of LoRA ask for a weight of one matrix.
STARTS: dict[bool | str, tuple[Start, Start]] = {
    True: (_start_kaiming, _start_zero),
    False: (_start_kaiming, _start_kaiming),
    "gaussian": (_start_gaussian, _start_zero),
}


@adapts("experts")
class ExpertsUnit(LoraUnit):
    """A and B of each adapted parameter of one module.

    PEFT nests a wrapper for each parameter, the first of the module innermost; the attributes are named after that, so
    of two parameters the last has `lora_A` and the first `base_layer_lora_A`.

    Attributes:
        scaling: the factor s that the configuration has for the module.
        ratios: what a parameter's own s is of that, by parameter.
    """

    by_row: ClassVar[bool] = False
    file_keys: ClassVar[dict[str, str]] = NestedKeys()

    def __init__(
        self, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any, device: torch.device, dtype: Any
    ) -> None:
        super().__init__(config, path, base, layer, device, dtype)
        # Of all that the module keeps; the adapted ones are in `prefixes`.
        self.kept = Experts.shapes(layer)
        self.prefixes = _prefixes(config, path, layer)
        self.is_transposed = _is_transposed(layer)
        self.ratios = {name: config.scaling_of(f"{path}.{name}") / (self.scaling or 1.0) for name in self.prefixes}

    @classmethod
    def shapes(cls, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`.

        Raises:
            ValueError: the configuration has what parameters of this kind cannot do.
        """
        _check(config)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, prefix in _prefixes(config, path, layer).items():
            *experts, n, k = Experts.shapes(layer)[name]
            rank = config.rank_of(f"{path}.{name}") * math.prod(experts)
            n, k = (k, n) if experts and _is_transposed(layer) else (n, k)
            shapes[f"{prefix}lora_A"], shapes[f"{prefix}lora_B"] = (rank, k), (n, rank)
        return shapes

    def initialize(self, config: LoraConfig, path: str, base: type[BaseWeight], layer: Any) -> None:
        """See `AdapterUnit.initialize`."""
        start_A, start_B = STARTS[config.init_lora_weights]
        for name in self.prefixes:
            A, B = self.pair(name)
            r = A.shape[0] // self.experts(name)
            start_A(A, r)
            start_B(B, r)

    def parameters_of_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """See `LoraUnit.parameters_of_factors`; those of the first parameter."""
        return self.pair(next(iter(self.prefixes)))

    def pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A (r E, in) and B (out, r E) of one parameter."""
        prefix = self.prefixes[name]
        return self.get_parameter(f"{prefix}lora_A"), self.get_parameter(f"{prefix}lora_B")

    def experts(self, name: str) -> int:
        """E, which is 1 for a parameter of two dimensions."""
        return math.prod(self.kept[name][:-2])

    def left_right(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """L (E, n, r) and R (E, r, k) for which L R is what is added to a parameter; without E where it has none."""
        A, B = self.pair(name)
        E, s = self.experts(name), self.scaling * self.ratios[name]
        right = A.reshape(E, -1, A.shape[1]).to(dtype)
        left = (s * B).reshape(B.shape[0], -1, E).permute(2, 0, 1).to(dtype).contiguous()
        if len(self.kept[name]) == 2:
            return left[0], right[0]
        return (right.transpose(1, 2), left.transpose(1, 2)) if self.is_transposed else (left, right)

    @staticmethod
    def run(units: Sequence[Any], owner: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        """See `AdapterUnit.run`."""
        first, *others = units
        return first(owner, others, args, kwargs)

    def forward(  # type: ignore[override]
        self, owner: AdaptedLayer, others: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The module's output with this adapter and `others` in it.

        The module runs inside this call and not after it: engines that gather a unit's parameters hold them so long.

        Args:
            owner: the adapted module.
            others: the units that are at work beside this one.
            args: of the module's own forward.
            kwargs: of the module's own forward.
        """
        names = list(self.prefixes)
        own = owner.__dict__
        held = {name: own[name] for name in names if name in own}
        sums = {name: self.sum_with(name, getattr(owner, name), owner) for name in names}
        try:
            # An attribute of the instance hides the parameter of that name, and leaves it registered as it is.
            for name in names:
                own[name] = sums[name]
            if others:
                return others[0](owner, others[1:], args, kwargs)
            return owner.frozen(*args, **kwargs)
        finally:
            for name in names:
                del own[name]
            for name in held:
                own[name] = held[name]

    def sum_with(self, name: str, weight: Any, owner: Any) -> Any:
        """What the module finds under `name` while this adapter is at work."""
        total = WeightSum(weight, *self.left_right(name, weight.dtype))
        implementation = getattr(getattr(owner, "config", None), "_experts_implementation", None)
        return total if implementation in PLAIN_TORCH else total.dense()

    @torch.no_grad()
    def fold(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterUnit.fold`."""
        for name, part in parts(matrix, self.kept):
            if name in self.prefixes:
                left, right = self.left_right(name, matrix.dtype)
                whole = part if part.dim() == 3 else part[None]
                whole.baddbmm_(left.view(-1, *left.shape[-2:]), right.view(-1, *right.shape[-2:]))
        return matrix, bias

    def can_take(self, values: Mapping[str, Tensor], config: LoraConfig) -> bool:
        """See `AdapterUnit.can_take`; lower ranks are padded with zeros, expert by expert."""
        if values.keys() != self.by_file_key().keys():
            return False
        for name in self.prefixes:
            (A, B), (new_A, new_B) = self.pair(name), self._among(values, name)
            rank, ragged = divmod(new_A.shape[0], self.experts(name))
            fits = (
                A.shape[1:] == new_A.shape[1:] and B.shape[:1] == new_B.shape[:1] and new_A.shape[0] == new_B.shape[1]
            )
            if ragged or not fits or rank > A.shape[0] // self.experts(name):
                return False
        return True

    def take(self, values: Mapping[str, Tensor], config: LoraConfig, path: str) -> None:
        """See `AdapterUnit.take`; the ratio of the scalings goes into B."""
        for name in self.prefixes:
            (A, B), (new_A, new_B) = self.pair(name), self._among(values, name)
            E = self.experts(name)
            rank = new_A.shape[0] // E
            ratio = config.scaling_of(f"{path}.{name}") / (self.scaling * self.ratios[name])
            A.zero_().view(E, -1, A.shape[1])[:, :rank] = new_A.view(E, rank, -1)
            B.zero_().view(B.shape[0], -1, E)[:, :rank] = ratio * new_B.view(B.shape[0], rank, E)

    def _among(self, values: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        prefix = self.prefixes[name]
        return values[self.file_keys[f"{prefix}lora_A"]], values[self.file_keys[f"{prefix}lora_B"]]

    def extra_repr(self) -> str:
        """Rank and scaling of each parameter, for `print(model)`."""
        ranks = {name: self.pair(name)[0].shape[0] // self.experts(name) for name in self.prefixes}
        return ", ".join(f"{name}: r={r} scaling={self.scaling * self.ratios[name]:g}" for name, r in ranks.items())


def _is_transposed(layer: Any) -> bool:
    return bool(getattr(layer, "is_transposed", False))


def _prefixes(config: LoraConfig, path: str, layer: Any) -> dict[str, str]:
    """Adapted parameter -> what stands before `lora_A` in the unit's attributes, in the module's order."""
    names = targeted_parameters(config, path, layer)
    return {name: "base_layer_" * (len(names) - 1 - position) for position, name in enumerate(names)}


def _check(config: LoraConfig) -> None:
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout={config.lora_dropout!r}: the parameters of target_parameters are adapted as weights, whose "
            "inputs an adapter does not see; set lora_dropout=0"
        )
    if config.lora_bias:
        raise ValueError("lora_bias=True: the parameters of target_parameters have no bias of B; set lora_bias=False")
    if config.init_lora_weights not in STARTS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} needs a weight of one matrix; target_parameters can start "
            f"with {', '.join(map(repr, STARTS))}"
        )
