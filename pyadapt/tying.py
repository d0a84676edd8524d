"""Weights that several modules read: found by the identity of the parameter, told, and adapted or untied together.

Language models share the input embedding's table with the output head (T5: with two more embeddings). An adapter on one
of the readers gives it a weight that the others do not have, which no checkpoint of the tied model can hold. So that is
refused, unless the configuration says what is meant:

    ensure_weight_tying=True      all readers get the adapter: one set of parameters, transposed for the head
    every reader named            each has an adapter of its own, and merging unties the weight
    modules_to_save names the     the head is trained apart from the embedding, and merging unties it
      output head alone
    trainable_token_indices       the other readers follow the rows of the embedding, as in PEFT
      names the embedding
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .base import base_of
from .layer import base_modules

logger = logging.getLogger("pyadapt")


@dataclass
class Targets:
    """What a configuration means for a model, by path; `tie` brings it in line with the tied weights.

    Attributes:
        config: the configuration with everything said outright.
        adapted: layers that get an adapter.
        saved: modules that are trained whole.
        tokens: embeddings and heads of which rows are trained -> their ids.
        sources: layer or module -> the one whose parameters it shares.
    """

    config: Any
    adapted: list[str]
    saved: list[str]
    tokens: dict[str, list[int]]
    sources: dict[str, str] = field(default_factory=dict)


def tied_weights(model: nn.Module) -> Iterator[list[str]]:
    """For each weight of a layer that can be adapted and that more than one module reads: the paths of its readers."""
    readers: dict[int, list[str]] = {}
    weights: set[int] = set()
    for path, module in base_modules(model):
        base = base_of(module)
        # FSDP1 may have put plain tensors into the place of parameters.
        stored = list(base.stored(module).values()) if base is not None else []
        for parameter in {id(p) for p in (*module._parameters.values(), *stored) if p is not None}:
            readers.setdefault(parameter, []).append(path)
        if base is not None and base.form != "experts":
            weights.add(id(stored[0]))
    return (paths for parameter, paths in readers.items() if len(paths) > 1 and parameter in weights)


def input_embedding(model: Any) -> nn.Module | None:
    """The model's input embedding, if it says which that is."""
    return _asked(model, "get_input_embeddings")


def output_embedding(model: Any) -> nn.Module | None:
    """The model's output head, if it says which that is."""
    return _asked(model, "get_output_embeddings")


def tie(targets: Targets, model: nn.Module, *, trained: bool = True) -> None:
    """Extend `targets` to all readers of each tied weight that it touches, or refuse.

    Args:
        targets: changed in place.
        model: the model.
        trained: False for an adapter that comes from a file: what PEFT has trained on one reader alone is loaded, and
            told.

    Raises:
        ValueError: one reader of a tied weight would be adapted without the others.
    """
    ensure = getattr(targets.config, "ensure_weight_tying", False)
    touched = False
    for readers in list(tied_weights(model)):
        ways = {
            "adapted": [path for path in readers if path in targets.adapted],
            "trained whole": [path for path in readers if _is_inside(path, targets.saved)],
            "trained in some rows": [path for path in readers if path in targets.tokens],
        }
        named = [path for paths in ways.values() for path in paths]
        if not named:
            continue
        touched = True
        rest = [path for path in readers if path not in named]
        used = [way for way, paths in ways.items() if paths]
        if _follow_rows(targets, ways["trained in some rows"], readers, model, ensure):
            if len(used) > 1:
                raise ValueError(_mixed(ways))
        elif ensure:
            if len(used) > 1:
                raise ValueError(_mixed(ways))
            _tie_all(targets, readers, used[0], model)
        elif not rest:
            logger.warning("%s share one weight and each get an adapter of their own: merging unties them", named)
        elif used == ["trained whole"] and all(_is_head(model, path) for path in named):
            logger.warning(
                "%s is trained apart from %s, whose weight it shares: merging gives it a weight of its own", named, rest
            )
        else:
            told = _one_sided(targets.config, used[0], named, rest)
            if trained:
                raise ValueError(told)
            logger.warning("%s. The file has it so: it is loaded as it is, and merging unties them", told)
    if ensure and not touched:
        logger.warning("ensure_weight_tying: no target shares its weight with another module, so nothing is tied")


def _follow_rows(targets: Targets, named: list[str], readers: list[str], model: nn.Module, ensure: bool) -> bool:
    """Let all readers follow the trained rows of one, if that is meant."""
    if not named:
        return False
    source = _source_of(readers, model)
    lists = {tuple(targets.tokens[path]) for path in named}
    if ensure and len(lists) > 1:
        told = ", ".join(f"{path}: {targets.tokens[path]}" for path in named)
        raise ValueError(f"ensure_weight_tying: {told} share one weight, but name different trainable_token_indices")
    if len(lists) > 1 or not (ensure or source in named):
        return False
    for path in readers:
        _check_can_follow(path, source, model)
        targets.tokens[path] = list(lists.copy().pop())
        if path != source:
            targets.sources[path] = source
    if source not in named:
        ids = {path: rows for path, rows in targets.tokens.items() if path not in targets.sources}
        targets.config = targets.config.replaced(trainable_token_indices=ids)
    return True


def _tie_all(targets: Targets, readers: list[str], way: str, model: nn.Module) -> None:
    config = targets.config
    source = _source_of(readers, model)
    excluded = getattr(config, "exclude_modules", None)
    for path in readers:
        _check_can_follow(path, source, model)
        if excluded and (re.fullmatch(excluded, path) if isinstance(excluded, str) else _matches(excluded, path)):
            raise ValueError(
                f"exclude_modules leaves out {path}, which ensure_weight_tying has to adapt with {source}: drop one of "
                "the two"
            )
    if way == "trained whole":
        new = [path for path in readers if not _is_inside(path, targets.saved)]
        targets.saved = _in_order(model, {*targets.saved, *new})
        targets.sources.update({path: source for path in readers if path in targets.saved and path != source})
        targets.config = config.replaced(modules_to_save=sorted({*config.modules_to_save, *new}))
        return
    if getattr(config, "use_dora", False):
        raise ValueError(f"use_dora: the magnitudes of {', '.join(readers)} are of different rows: they cannot be tied")
    targets.adapted = _in_order(model, {*targets.adapted, *readers})
    targets.sources.update({path: source for path in readers if path != source})
    wanted = config.target_modules
    if isinstance(wanted, str):
        wanted = "|".join([f"(?:{wanted})", *map(re.escape, readers)])
    else:
        wanted = sorted({*wanted, *readers})
    targets.config = config.replaced(target_modules=wanted)


def _source_of(readers: list[str], model: nn.Module) -> str:
    """The reader that owns what the others share: the input embedding, or else the first embedding or layer."""
    layers = {path: model.get_submodule(path) for path in readers}
    entry = input_embedding(model)
    found = [path for path, layer in layers.items() if layer is entry]
    found += [path for path, layer in layers.items() if isinstance(layer, nn.Embedding)]
    return (found or readers)[0]


def _check_can_follow(path: str, source: str, model: nn.Module) -> None:
    layer, first = model.get_submodule(path), model.get_submodule(source)
    base, wanted = base_of(layer), base_of(first)
    forms = ("linear", "embedding")
    if base is None or wanted is None or base.form not in forms or base.shape(layer) != wanted.shape(first):
        raise ValueError(
            f"{path} ({type(layer).__name__}) reads the weight of {source} as well, but is no layer that the same "
            "adapter can be put on"
        )


def _is_head(model: nn.Module, path: str) -> bool:
    base = base_of(model.get_submodule(path))
    return base is not None and base.form == "linear"


def _one_sided(config: Any, way: str, named: list[str], rest: list[str]) -> str:
    it, they = ", ".join(named), ", ".join(rest)
    option = {"adapted": "target_modules", "trained whole": "modules_to_save"}.get(way, "trainable_token_indices")
    # Not every method has an adapter that all readers of a weight can share.
    follow = "ensure_weight_tying=True lets all of them follow; " if hasattr(config, "ensure_weight_tying") else ""
    return (
        f"{it} would be {way}, but its weight is also that of {they}, which would not follow. "
        f"{follow}naming {they} in {option} as well makes them independent"
    )


def _mixed(ways: Mapping[str, list[str]]) -> str:
    told = "; ".join(f"{', '.join(paths)} would be {way}" for way, paths in ways.items() if paths)
    return f"{told}, but they share one weight and have to be tied: name them in the same way"


def _is_inside(path: str, modules: Sequence[str]) -> bool:
    return any(path == module or path.startswith(module + ".") for module in modules)


def _matches(names: Sequence[str], path: str) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _in_order(model: nn.Module, paths: set[str]) -> list[str]:
    return [path for path, _ in base_modules(model) if path in paths]


def _asked(model: Any, question: str) -> nn.Module | None:
    try:
        return getattr(model, question)()
    except (AttributeError, NotImplementedError):
        return None
