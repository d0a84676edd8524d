"""Getting a model's quantised weights ready for an engine that shards parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base import base_of
from ..base.bitsandbytes import Bitsandbytes4bit, BitsandbytesInt8, to_int8
from ..base.dense import Dense
from ..base.int8 import Int8
from ..integrations.transformers import forget_quantization, is_transformers_model, mark_quantized
from ..layer import AdaptedLayer, base_modules, dense_dtype
from ..quantization import set_storage_dtype
from .sharding import engine_of
from .ties import unite_tied_tables

ENGINES = {"zero3": "DeepSpeed ZeRO-3", "fsdp1": "FSDP1", "fsdp2": "FSDP2"}


@dataclass(frozen=True)
class ShardingReport:
    """What `prepare_for_sharding` has found and done; `str(report)` says it in words.

    Attributes:
        engine: "zero3", "fsdp1" or "fsdp2".
        layers: paths of the layers with an int8 weight, which the engine will shard.
        bytes: of their weights and scales, over all ranks together.
        converted: paths of those that bitsandbytes had quantised before.
        stored_as: the floating dtype that FSDP1 sees their bytes as, which its mixed precision has to keep; else None.
        united: paths of embeddings that are one module now with the one whose table they share (see `ties`).
    """

    engine: str
    layers: tuple[str, ...] = ()
    bytes: int = 0
    converted: tuple[str, ...] = ()
    stored_as: torch.dtype | None = None
    united: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line for each thing that was found or done."""
        name = ENGINES[self.engine]
        if not self.layers and not self.united:
            return f"nothing to prepare for {name}: the model has no int8 weights"
        lines = []
        if self.united:
            lines.append(f"{len(self.united)} embeddings share their module with another: {_some(self.united)}")
        if self.layers:
            lines.append(
                f"{len(self.layers)} int8 layers, {self.bytes:,} bytes, of which {name} leaves each rank its part"
            )
        if self.converted:
            lines.append(
                f"{len(self.converted)} of them were made pyadapt's int8 from bitsandbytes' without loss: "
                f"{_some(self.converted)}; without an adapter they no longer round their inputs to int8"
            )
        if self.stored_as is not None:
            lines.append(
                f"their bytes are held as {self.stored_as}: FSDP1's mixed precision has to use just that dtype"
            )
        return "\n".join(lines)


def prepare_for_sharding(model: nn.Module, engine: str) -> ShardingReport:
    """Let the quantised weights of `model` be parameters that an engine can shard; in place, before it gets the model.

    Layers that bitsandbytes has made int8 become layers of pyadapt's own int8: the same int8 values, with SCB / 127 as
    their scale. An engine would keep bitsandbytes' whole on each rank (ZeRO-3) or fail on them (FSDP1, FSDP2). FSDP1,
    which flattens floating parameters alone, sees the bytes of an int8 weight as the model's dtype. Under FSDP2
    embeddings that share their table become one module in several places (see `ties`).

    Args:
        model: plain or wrapped.
        engine: "zero3", "fsdp1" or "fsdp2".

    Returns:
        What was done; `print` it.

    Raises:
        ValueError: an unknown engine, or weights that cannot be sharded (bitsandbytes' 4-bit); nothing was changed.
        RuntimeError: an engine has the model already, an adapter is merged into a layer that would be changed, or one
            is offloaded; nothing was changed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
    running = engine_of(model)
    if running is not None:
        raise RuntimeError(f"{running} has this model already: prepare it first, then hand it over")
    layers: list[tuple[str, Any]] = [(path, layer) for path, layer in base_modules(model) if base_of(layer) is not None]
    found = [(path, layer) for path, layer in layers if base_of(layer) is BitsandbytesInt8]
    _check_shardable(layers, engine)
    dtype = dense_dtype(model) or torch.float32
    for _, layer in found:
        to_int8(layer, dtype)
        if isinstance(layer, AdaptedLayer):
            layer.base = Int8
    if found and is_transformers_model(model):
        forget_quantization(model)
        mark_quantized(model, [path for path, layer in layers if base_of(layer) is Dense])
    int8 = [(path, layer) for path, layer in layers if base_of(layer) is Int8]
    size = sum(part.numel() * part.element_size() for _, layer in int8 for part in Int8.stored(layer).values())
    if engine == "fsdp1":
        set_storage_dtype(model, dtype)
    return ShardingReport(
        engine,
        layers=tuple(path for path, _ in int8),
        bytes=size,
        converted=tuple(path for path, _ in found),
        stored_as=dtype if engine == "fsdp1" and int8 else None,
        united=tuple(unite_tied_tables(model)) if engine == "fsdp2" else (),
    )


def _check_shardable(layers: list[tuple[str, Any]], engine: str) -> None:
    """Refuse weights that the engine cannot shard, or that cannot be changed now."""
    packed = [path for path, layer in layers if base_of(layer) is Bitsandbytes4bit]
    if packed:
        raise ValueError(
            f"{_some(packed)}: bitsandbytes' 4-bit weights cannot be sharded by {ENGINES[engine]}, for what they are "
            "read with (quant_state) is no parameter. Load the model with load_in_8bit=True, or dense and then "
            "pyadapt.quantize(model); or train it under DDP"
        )
    for path, layer in layers:
        if base_of(layer) is not BitsandbytesInt8:
            continue
        try:
            BitsandbytesInt8.shape(layer)
            BitsandbytesInt8.operands(layer)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{path}: {error}") from None
        if isinstance(layer, AdaptedLayer) and layer.unmerged is not None:
            raise RuntimeError(f"an adapter is merged into {path}; unmerge_adapter() first")


def _some(paths: Any) -> str:
    names = list(paths)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
