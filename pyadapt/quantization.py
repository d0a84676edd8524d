"""Making a model's linear layers int8, in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .base import base_of
from .base.dense import Dense
from .base.int8 import Int8, check_storage_dtype, make_int8, store_as
from .distributed.sharding import replacing, whole
from .integrations.transformers import is_transformers_model, mark_quantized
from .layer import base_modules
from .model import is_wrapped
from .surgery import check_adoptable
from .targets import matches, output_heads

SCHEMES = ("int8",)


def quantize(
    model: nn.Module,
    scheme: str = "int8",
    skip: Iterable[str] | None = None,
    storage_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Store the weights of `model`'s linear layers as int8 with one scale an output row.

    One layer at a time, so that memory never exceeds the model and one layer. The same layers compute as before, from
    the int8 weight directly. `save_pretrained` then writes the int8 weights; `load_quantized` reads them.

    Args:
        model: a model with dense weights, not wrapped yet.
        scheme: "int8".
        skip: names of layers to leave alone, matched by dotted suffix (or as a prefix of the path);
            None leaves the output head alone, an empty list nothing.
        storage_dtype: a floating dtype in whose bytes the int8 values are held, for FSDP1, which can shard no integers:
            that of the model's other parameters. It changes no value, and no file.

    Returns:
        `model`.

    Raises:
        ValueError: an unknown scheme or storage dtype, a name in `skip` that is not there, nothing to quantise, or a
            weight with a NaN.
        RuntimeError: the model is wrapped already.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
    check_storage_dtype(storage_dtype)
    if is_wrapped(model):
        raise RuntimeError("quantize the model first, then wrap it: this one carries adapters already")
    skip = [skip] if isinstance(skip, str) else skip if skip is None else list(skip)
    paths = layers_to_quantize(model, skip)
    for path in paths:
        layer = model.get_submodule(path)
        check_adoptable(path, layer)
        with whole(layer, [layer]):
            finite = _is_finite(Dense.operands(layer).weight)
        if not finite:
            raise ValueError(
                f"{path}.weight holds a NaN or an infinity and cannot be quantised; the model is unchanged"
            )
    for path in paths:
        layer = model.get_submodule(path)
        with replacing(layer):
            make_int8(layer)
            store_as(layer, storage_dtype)
    if is_transformers_model(model):
        mark_quantized(model, skip)
    return model


def set_storage_dtype(model: nn.Module, storage_dtype: torch.dtype | None) -> nn.Module:
    """Change what `quantize` was told of `storage_dtype`, before the model is sharded; a wrapped model as well.

    Raises:
        ValueError: another dtype than bfloat16, float16, float32 and None.
        RuntimeError: the model is sharded already.
    """
    check_storage_dtype(storage_dtype)
    for _, layer in base_modules(model):
        if base_of(layer) is Int8:
            store_as(layer, storage_dtype)
    return model


def layers_to_quantize(model: nn.Module, skip: list[str] | None) -> list[str]:
    """Paths of the dense linear layers that `quantize` would take."""
    paths = [path for path, layer in base_modules(model) if base_of(layer) is Dense]
    if skip is None:
        skipped = output_heads(model)
    else:
        unknown = [name for name in skip if not any(_is_in(name, path) for path, _ in base_modules(model))]
        if unknown:
            raise ValueError(f"skip: no module is named {', '.join(map(repr, unknown))}")
        skipped = {path for path in paths if any(_is_in(name, path) for name in skip)}
    chosen = [path for path in paths if path not in skipped]
    if not chosen:
        raise ValueError("the model has no dense linear layer to quantise (is it quantised already?)")
    _check_not_tied(model, chosen)
    return chosen


def _is_finite(weight: Tensor) -> bool:
    """Whether every value is; without temporaries of the weight's size, which `torch.isfinite(weight)` makes."""
    if weight.numel() == 0 or weight.is_meta:
        return True
    low, high = torch.aminmax(weight.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _is_in(name: str, path: str) -> bool:
    """Whether `name` means the module at `path` or one around it."""
    return matches([name], path) or f".{name}." in f".{path}."


def _check_not_tied(model: nn.Module, paths: list[str]) -> None:
    """A weight that another module reads as well cannot change its dtype under it."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(path)
    for path in paths:
        others = set(users[id(model.get_submodule(path).weight)]) - {path}
        if others:
            raise ValueError(
                f"{path} shares its weight with {', '.join(sorted(others))} and cannot be made int8 alone; "
                f"add {path!r} to skip"
            )
