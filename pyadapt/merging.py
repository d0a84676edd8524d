"""Folding adapters into the weights they adapt, with every result checked before anything is changed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import BaseWeight, base_of
from .biases import bias_among, check_biases_finite, own_bias, remove_biases, take_over_biases
from .distributed import agreement
from .distributed.sharding import Sharding, sharding_of, whole_under
from .files import Path
from .layer import AdaptedLayer, adapted_layers, base_modules, dense_dtype, restore_layer, saved_modules
from .merged import DENSE, ORIGINAL, MergedLayer, MergeReport, dequantized
from .method import AdapterUnit
from .originals import OriginalWeights
from .untying import SharedBefore, TiedMerge, say_untied

logger = logging.getLogger("pyadapt")


def merge_in_place(model: nn.Module, names: Sequence[str]) -> list[tuple[Any, Tensor]]:
    """Fold the named adapters into their layers' own storage, keeping the old weights so that unmerging is exact.

    Where an engine has sharded them, each layer is gathered in its turn, and every rank keeps its own part.

    Returns:
        The parts of this rank from before, for `unmerge_in_place`; of a model that is not sharded none.

    Raises:
        ValueError: a merged weight would hold a NaN or an infinity, or have to be a parameter of its own in a sharded
            model; nothing was changed.
    """
    for merged in _merged_in_place(model, names):
        merged.check_finite()
    ties, sharding = TiedMerge(model, names), sharding_of(model)
    if sharding is not None:
        return _merge_parts(model, names, ties, sharding)
    for merged in _merged_in_place(model, names):
        layer = merged.layer
        layer.unmerged = ties.keep(merged.path, layer)
        if merged.bias is not None:
            layer.unmerged["bias"] = own_bias(layer).detach().clone()
        ties.separate(merged.path, layer)
        layer.base.assign(layer, merged.matrix)
        _assign_bias(layer, merged.bias)
    return []


def _merge_parts(
    model: nn.Module, names: Sequence[str], ties: TiedMerge, sharding: Sharding
) -> list[tuple[Any, Tensor]]:
    check_stays_tied(ties, sharding)
    kept = sharding.keep([layer for _, layer in adapted_layers(model) if _units(layer, names)])
    for merged in _merged_in_place(model, names, write=True):
        layer = merged.layer
        layer.unmerged = {} if merged.bias is None else {"bias": None}
        # The parameter of a layer that follows another is written by then.
        if ties.follows(merged.path) is None:
            layer.base.assign(layer, merged.matrix)
        _assign_bias(layer, merged.bias)
    return kept


def check_stays_tied(ties: TiedMerge, sharding: Sharding) -> None:
    """Refuse a merge that would give a layer of a sharded model a parameter of its own.

    Raises:
        ValueError: so it is; nothing was changed.
    """
    if ties.untied:
        raise ValueError(
            f"merging gives {', '.join(sorted(ties.untied))}, whose weights are tied, new parameters, which "
            f"{sharding.name} cannot take in: pyadapt.export(model, folder) writes the merged model"
        )


def unmerge_in_place(model: nn.Module, parts_before: Sequence[tuple[Any, Tensor]] = ()) -> None:
    """Put back, bit for bit, the weights from before `merge_in_place`, which has given `parts_before`."""
    sharding = sharding_of(model) if parts_before else None
    if sharding is not None:
        sharding.put_back(parts_before)
        for _, layer in adapted_layers(model):
            layer.unmerged = None
        return
    for _, layer in adapted_layers(model):
        if layer.unmerged is not None:
            if isinstance(layer.unmerged, SharedBefore):
                layer.unmerged.put_back(layer)
            else:
                layer.base.put_back(layer, layer.unmerged)
            _assign_bias(layer, layer.unmerged.get("bias"))
            layer.unmerged = None


def merged_weights(
    model: nn.Module, names: Sequence[str], original: Path | None, report: MergeReport, write: bool = False
) -> Iterator[MergedLayer]:
    """Each layer that an adapter or a quantiser has changed, with its merged weight.

    Of a sharded model each layer is whole until the next is asked for; every rank has to go through all of them.

    Args:
        model: a wrapped model.
        names: the adapters to fold in.
        original: a checkpoint to take the weights of quantised layers from; by default they are dequantised.
        report: filled in as layers pass.
        write: whether what is written to a layer that is sharded is to be kept.
    """
    sharding = sharding_of(model)
    with agreement.together("reading the original weights", among_ranks=sharding is not None):
        originals = OriginalWeights(original, model) if original is not None else None
    ties = TiedMerge(model, names)
    others = dense_dtype(model)
    for path, layer in list(base_modules(model)):
        base = base_of(layer)
        units = _units(layer, names)
        if base is None or not (units or base.quantized):
            continue
        if originals is not None and any(unit.fits_quantization for unit in units):
            raise ValueError(
                f"the adapter on {path} makes up for what quantising took from its weight (LoftQ), which the original "
                "weight still has: merge without `original`"
            )
        with whole_under(sharding, [layer, *units], write):
            with agreement.together(f"merging {path}", among_ranks=sharding is not None):
                if base.quantized and originals is not None:
                    source, matrix = ORIGINAL, originals.matrix(path, layer, base)
                else:
                    source, matrix = dequantized(base) if base.quantized else DENSE, base.matrix(layer)
                bias = bias_among(layer, names)
                merged = ties.share(_fold(path, layer, base, matrix, bias, units, base.merged_dtype(layer, others)))
                merged.check_finite()
                estimated = source not in (DENSE, ORIGINAL)
                report.sources[path] = source
                report.errors[path] = base.quantization_error(layer) if estimated else merged.rounding_error()
            yield merged


def merge_to_plain(model: nn.Module, names: Sequence[str], original: Path | None) -> MergeReport:
    """Fold the named adapters in and make every layer that was adapted or quantised a plain dense one.

    Args:
        model: a wrapped model.
        names: the adapters to fold in.
        original: see `merged_weights`.

    Raises:
        ValueError: a merged weight would hold a NaN or an infinity; nothing was changed.
    """
    for _ in merged_weights(model, names, original, MergeReport()):
        pass
    check_biases_finite(model, names)
    take_over_biases(model, names)
    remove_biases(model)
    report, ties = MergeReport(), TiedMerge(model, names)
    for merged in merged_weights(model, names, original, report):
        if isinstance(merged.layer, AdaptedLayer):
            restore_layer(merged.layer)
        ties.separate(merged.path, merged.layer)
        merged.base.make_dense(merged.layer, merged.stored())
        _assign_bias(merged.layer, merged.bias)
    take_over(model, names)
    if ties.unties:
        say_untied(getattr(model, "config", None))
    logger.info("%s", report)
    return report


def refuse_sharded(model: nn.Module, action: str) -> None:
    """Refuse what would take parameters off a model that an engine has sharded, or give it others.

    Raises:
        RuntimeError: so it is; nothing was changed.
    """
    sharding = sharding_of(model)
    if sharding is not None:
        raise RuntimeError(
            f"cannot {action}: {sharding.name} has sharded this model, and keeps the parameters that would go or be "
            "replaced. pyadapt.export(model, folder) writes the merged plain model, model.merge_adapter() merges in "
            "place, and model.disable_adapter() gives the base model's answers"
        )


def take_over(model: nn.Module, names: Sequence[str]) -> None:
    """Write the values of the trained copies at work into the modules that they were made of.

    A weight that other modules of `model` read as well (an output head tied to the embedding) is left to them, and the
    module gets one of its own; where one trained weight answers for all of them, they keep sharing theirs.
    """
    places: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
    for _, module in saved_modules(model):
        live = module.copy_among(names)
        if live is None:
            continue
        for name, value in module.copies[live].state_dict(keep_vars=True).items():
            path, _, attribute = name.rpartition(".")
            owner = module.get_submodule(path)
            places.setdefault(id(getattr(owner, attribute)), []).append((owner, attribute, value))
    readers = Counter(id(p) for _, m in base_modules(model) for p in m.parameters(recurse=False))
    given: dict[int, nn.Parameter] = {}
    with torch.no_grad():
        for held, takers in places.items():
            owner, attribute, value = takers[0]
            own = getattr(owner, attribute)
            if readers[held] <= len(takers) and len({id(trained) for _, _, trained in takers}) == 1:
                own.copy_(value)
                continue
            for owner, attribute, value in takers:
                if id(value) not in given:
                    given[id(value)] = nn.Parameter(value.detach().clone(), requires_grad=own.requires_grad)
                setattr(owner, attribute, given[id(value)])


def _merged_in_place(model: nn.Module, names: Sequence[str], write: bool = False) -> Iterator[MergedLayer]:
    ties, sharding = TiedMerge(model, names), sharding_of(model)
    for path, layer in adapted_layers(model):
        units = _units(layer, names)
        if units:
            with whole_under(sharding, [layer, *units], write):
                with agreement.together(f"merging {path}", among_ranks=sharding is not None):
                    bias = bias_among(layer, names)
                    matrix, dtype = layer.base.matrix(layer), layer.base.dtype(layer)
                    merged = ties.share(_fold(path, layer, layer.base, matrix, bias, units, dtype))
                    if sharding is not None:
                        merged.check_finite()
                yield merged


def _units(layer: nn.Module, names: Sequence[str]) -> list[AdapterUnit]:
    if not isinstance(layer, AdaptedLayer):
        return []
    return [unit for name in names if (unit := layer.unit(name)) is not None]


def _fold(
    path: str,
    layer: Any,
    base: type[BaseWeight],
    matrix: Tensor,
    bias: Tensor | None,
    units: Sequence[AdapterUnit],
    dtype: torch.dtype,
) -> MergedLayer:
    before = None if bias is None else bias.detach().to(matrix.dtype, copy=True)
    after = before
    try:
        for fold in [unit.folding(matrix, before) for unit in units]:
            matrix, after = fold(matrix, after)
    except ValueError as error:
        raise ValueError(f"{path} cannot be merged: {error}") from None
    return MergedLayer(path, layer, base, matrix, None if after is before else after, dtype)


def _assign_bias(layer: Any, bias: Tensor | None) -> None:
    if bias is not None:
        with torch.no_grad():
            own_bias(layer).copy_(bias)
