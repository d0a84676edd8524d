"""Bytes a rank and communication a step, as formulas of what a model holds; docs/scaling.md explains them.

Nothing is measured here: `tests/distributed/test_scaling.py` compares with what is. Notation: R ranks, T bytes of
trained parameters, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

FP32 = 4


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        shape: of the whole.
        itemsize: bytes a value.
        trained: whether it is.
        group: number of the transformer's block that it lies in; -1 outside blocks.
        module: number of the module that owns it, in the model's order.
    """

    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    group: int
    module: int

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return prod(self.shape) * self.itemsize


@dataclass
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: its part of frozen and trained parameters.
        buffers: what the engine keeps beside them from the start on.
        gradients: what the first backward adds, and what is there at the optimizer step.
        optimizer: AdamW's two moments.
        gathered: the most that is there of other ranks' parameters at once.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    gathered: int

    @property
    def at_start(self) -> int:
        """Before the first step."""
        return self.parameters + self.buffers

    @property
    def total(self) -> int:
        """All but activations."""
        return self.parameters + self.buffers + self.gradients + self.optimizer + self.gathered


@dataclass
class Traffic:
    """Collectives of one optimizer step: kind -> bytes of the whole tensors, and how many."""

    size: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, size: int, calls: int) -> None:
        """So many more."""
        if size:
            self.size[kind] = self.size.get(kind, 0) + size
            self.calls[kind] = self.calls.get(kind, 0) + calls

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends around a ring: (R-1)/R of a gather or reduce-scatter, twice that to all-reduce."""
        share = (ranks - 1) / ranks
        return share * sum(size * (2 if kind == "all-reduce" else 1) for kind, size in self.size.items())


def inventory(model: Any) -> list[Weight]:
    """The parameters of a model, each once; on the meta device too."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    groups: dict[Any, int] = {}
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for number, block in enumerate(blocks):
        groups |= dict.fromkeys(block.parameters(), number)
    found: dict[Any, Weight] = {}
    for number, module in enumerate(model.modules()):
        for parameter in module.parameters(recurse=False):
            group = groups.get(parameter, -1)
            size = parameter.element_size()
            found.setdefault(parameter, Weight(tuple(parameter.shape), size, parameter.requires_grad, group, number))
    return list(found.values())


def total(weights: Iterable[Weight]) -> int:
    """Bytes of the whole."""
    return sum(weight.size for weight in weights)


def trained(weights: Iterable[Weight]) -> list[Weight]:
    """Those that are trained."""
    return [weight for weight in weights if weight.trained]


# --- bytes a rank ---


def memory(engine: str, weights: list[Weight], ranks: int) -> Memory:
    """Of a training with AdamW whose trained parameters are fp32.

    Args:
        engine: "ddp", "fsdp2", "fsdp1" (adapters as units of their own) "zero3" or "zero3 offload" (nothing
            fetched ahead or kept, a reduction bucket as large as what is trained).
        weights: see `inventory`.
        ranks: R.
    """
    T = trained(weights)
    if engine == "ddp":
        # The reducer's buckets are a second copy of the gradients.
        return Memory(total(weights), total(T), total(T), 2 * total(T), 0)
    if engine == "fsdp2":
        share = sum(rows_part(weight, ranks) for weight in T)
        return Memory(sum(rows_part(w, ranks) for w in weights), 0, share, 2 * share, gathered_fsdp2(weights, ranks))
    if engine == "fsdp1":
        share = sum(even_part(total(unit), ranks) for unit in fsdp1_units(weights) if unit[0].trained)
        whole = sum(even_part(total(unit), ranks) for unit in fsdp1_units(weights))
        return Memory(whole, 0, share, 2 * share, gathered_fsdp1(weights, ranks))
    if engine in ("zero3", "zero3 offload"):
        parts = sum(even_part(weight.size, ranks) for weight in weights)
        share = sum(even_part(weight.size, ranks) for weight in T)
        # fp32 masters, even of fp32 parameters; a place for gradients; the bucket in which they are reduced.
        # With the optimizer on the CPU, gradients have a place there too.
        places = 3 if engine.endswith("offload") else 2
        return Memory(parts, places * share + total(T), 0, 2 * share, gathered_zero3(weights, ranks))
    raise ValueError(f"engine {engine!r} has no formula")


def rows_part(weight: Weight, ranks: int) -> int:
    """FSDP2 splits rows; the last rank's part is filled up."""
    return ceil(weight.shape[0] / ranks) * (weight.size // max(1, weight.shape[0]))


def even_part(size: int, ranks: int) -> int:
    """FSDP1 and ZeRO-3 split flat values."""
    return ceil(size / ranks)


def block_sizes(weights: Iterable[Weight]) -> dict[int, int]:
    """Bytes of each block; -1: of what is outside blocks."""
    sizes: dict[int, int] = {-1: 0}
    for weight in weights:
        sizes[weight.group] = sizes.get(weight.group, 0) + weight.size
    return sizes


def gathered_fsdp2(weights: list[Weight], ranks: int) -> int:
    """The root's parameters from the first layer to the last, and three times a block.

    A block is gathered into one buffer and copied out of it, and that buffer is kept until the next block's has come.
    One rank alone has a copy only.
    """
    sizes = block_sizes(weights)
    root = sizes.pop(-1)
    return root + (3 if ranks > 1 else 1) * max(sizes.values(), default=0)


def fsdp1_units(weights: list[Weight]) -> list[list[Weight]]:
    """Frozen parameters by block, trained ones by module."""
    units: dict[Any, list[Weight]] = {}
    for weight in weights:
        units.setdefault(("unit", weight.module) if weight.trained else ("block", weight.group), []).append(weight)
    return list(units.values())


def gathered_fsdp1(weights: list[Weight], ranks: int) -> int:
    """The root's parameters, and in backward three blocks: at work, gathered ahead, and not yet freed.

    One rank alone does not shard.
    """
    if ranks == 1:
        return 0
    sizes = block_sizes(weight for weight in weights if not weight.trained)
    root = sizes.pop(-1)
    return root + 3 * max(sizes.values(), default=0)


def gathered_zero3(weights: list[Weight], ranks: int) -> int:
    """Twice the largest module, which is gathered in parts and put together.

    It is no less than the gradients on their way to the bucket, which is all where one rank is alone.
    """
    reduced = total(trained(weights))
    if ranks == 1:
        return reduced
    modules: dict[int, int] = {}
    for weight in weights:
        modules[weight.module] = modules.get(weight.module, 0) + weight.size
    return max(reduced, 2 * max(modules.values()))


# --- communication a step ---


def traffic(engine: str, weights: list[Weight], ranks: int, accumulate: int = 1, reshard: bool = True) -> Traffic:
    """Of one optimizer step.

    Args:
        engine: see `memory`.
        weights: see `inventory`.
        ranks: R; one alone has nobody to talk to.
        accumulate: micro-batches a step.
        reshard: whether FSDP frees a block behind its forward (FULL_SHARD, reshard_after_forward).
    """
    found = Traffic()
    if ranks == 1:
        return found
    T = trained(weights)
    sizes = block_sizes(weights)
    L = len(sizes) - 1
    if engine == "ddp":
        found.add("all-reduce", total(T), ddp_buckets(total(T)))
    elif engine == "fsdp2":
        padded = [rows_part(weight, ranks) * ranks for weight in weights]
        blocks = sum(size for size, weight in zip(padded, weights, strict=True) if weight.group >= 0)
        found.add("all-gather", accumulate * sum(padded), accumulate * (L + (sizes[-1] > 0)))
        # The root stays gathered until backward. A block that is not freed has nothing to gather again.
        found.add("all-gather", accumulate * blocks * reshard, accumulate * L * reshard)
        reduced = [(size, weight.group) for size, weight in zip(padded, weights, strict=True) if weight.trained]
        found.add("reduce-scatter", sum(size for size, _ in reduced), len({group for _, group in reduced}))
    elif engine == "fsdp1":
        units = fsdp1_units(weights)
        inner = [unit for unit in units if unit[0].group >= 0 or unit[0].trained]
        found.add("all-gather", accumulate * sum(map(total, units)), accumulate * len(units))
        found.add("all-gather", accumulate * sum(map(total, inner)) * reshard, accumulate * len(inner) * reshard)
        moved = [unit for unit in units if unit[0].trained]
        found.add("reduce-scatter", sum(map(total, moved)), len(moved))
    elif engine in ("zero3", "zero3 offload"):
        unreached = behind_no_gradient(weights)
        for pass_over in (weights, [weight for weight in weights if weight.module not in unreached]):
            # A module is gathered in one call for each of its dtypes.
            gathers = {(weight.module, weight.itemsize) for weight in pass_over}
            found.add("all-gather", accumulate * total(pass_over), accumulate * len(gathers))
        # Each micro-batch's gradients are reduced.
        found.add("reduce-scatter", accumulate * total(T), accumulate)
    else:
        raise ValueError(f"engine {engine!r} has no formula")
    return found


def ddp_buckets(size: int, first: int = 1 << 20, others: int = 25 << 20) -> int:
    """How many buckets DDP reduces: the first of 1 MiB, then of 25 MiB, each filled until it is over its limit."""
    return 1 if size <= first else 1 + ceil((size - first) / others)


def behind_no_gradient(weights: list[Weight]) -> set[int]:
    """Modules that backward never reaches: the frozen token embedding, and the norm behind it."""
    modules: dict[int, list[Weight]] = {}
    for weight in weights:
        modules.setdefault(weight.module, []).append(weight)
    embedding = min(modules)
    if any(weight.trained for weight in modules[embedding]):
        return set()
    norms = [
        module
        for module, held in modules.items()
        if all(weight.group == 0 and not weight.trained and len(weight.shape) == 1 for weight in held)
    ]
    return {embedding, *sorted(norms)[:1]}


# --- values of adapters ---


def adapter_values(method: str, K: int, N: int, r: int = 0, **options: int) -> int:
    """Trained values on a linear layer K -> N.

    Args:
        method: "lora", "dora", "ia3", "ia3 feed-forward", "loha", "lokr".
        K: input features.
        N: output features.
        r: rank.
        options: of LoKr: factors `K1`, `N1` (K = K1 K2, N = N1 N2), and `whole` where its second factor is no product.
    """
    if method == "lora":
        return r * (K + N)
    if method == "dora":
        return r * (K + N) + N
    if method == "ia3":
        return N
    if method == "ia3 feed-forward":
        return K
    if method == "loha":
        return 2 * r * (K + N)
    if method == "lokr":
        K1, N1 = options["K1"], options["N1"]
        K2, N2 = K // K1, N // N1
        return K1 * N1 + (K2 * N2 if options.get("whole") else r * (K2 + N2))
    raise ValueError(f"method {method!r} has no formula")


# --- activations ---


def llama_block_activations(hidden: int, inner: int, kv: int, heads: int, r: int, itemsize: int) -> int:
    """Bytes a token that a block of a Llama with LoRA on all seven linear layers keeps for backward.

    In the model's dtype: what the projections read (4: both norms' outputs, the attention's output, and q, which the
    attention keeps with k and v), and in the MLP the outputs of gate, its activation, up, and their product. In fp32:
    what the two norms read with their means, the attention's log-sum, and S = x A' of each layer.

    Args:
        hidden: width of the model.
        inner: width of its MLP.
        kv: width of keys, and of values.
        heads: of the attention.
        r: rank.
        itemsize: bytes of the model's dtype.
    """
    return (4 * hidden + 2 * kv + 4 * inner) * itemsize + (2 * hidden + 2 + heads + 7 * r) * FP32
