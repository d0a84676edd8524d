"""Merging into weights that several modules read: each is changed once, and comes apart where its readers differ."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .base import base_of
from .layer import AdaptedLayer, SavedModule, base_modules
from .tying import tied_weights

if TYPE_CHECKING:
    from .merged import MergedLayer

logger = logging.getLogger("pyadapt")


class SharedBefore(dict[str, Any]):
    """What unmerging gives back to a layer whose weight was untied: the parameters that it shared, by attribute."""

    def put_back(self, layer: nn.Module) -> None:
        """Let `layer` read them again."""
        for name, value in self.items():
            if isinstance(value, nn.Parameter):
                setattr(layer, name, value)


class TiedMerge:
    """Which readers of a tied weight have one weight after a merge, too.

    Readers of one parameter that the same adapter parameters change keep one weight; where they do not all, each group
    gets a parameter of its own. No weight is ever changed twice.

    Attributes:
        leaders: path -> path of the reader whose merged weight it shares; itself where it is the first.
        untied: paths of the layers that no longer read the parameter they have now.
        unties: whether some weight is no longer shared by all its readers, be it that one is trained whole.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.leaders: dict[str, str] = {}
        self.untied: set[str] = set()
        self.unties = False
        self._model = model
        self._matrices: dict[str, Tensor] = {}
        modules = dict(base_modules(model))
        for readers in tied_weights(model):
            groups: dict[Any, list[str]] = {}
            for path in readers:
                groups.setdefault(_changes(modules, path, names), []).append(path)
            self.unties |= len(groups) > 1
            for changes, paths in groups.items():
                if isinstance(changes, tuple) and changes:
                    self.leaders.update(dict.fromkeys(paths, paths[0]))
                    self.untied |= set(paths) if len(groups) > 1 else set()
        self._group_sizes = Counter(self.leaders.values())

    def follows(self, path: str) -> str | None:
        """The leader of the layer at `path`, if that is another."""
        leader = self.leaders.get(path, path)
        return None if leader == path else leader

    def share(self, merged: MergedLayer) -> MergedLayer:
        """`merged` with the weight of the leader, which comes first, where there is one.

        The layer's own would hold the adapter twice if the leader's was written already: it is the same parameter.
        """
        leader = self.leaders.get(merged.path)
        if leader is None or self._group_sizes[leader] == 1:
            return merged
        return replace(merged, matrix=self._matrices.setdefault(leader, merged.matrix))

    def keep(self, path: str, layer: Any) -> dict[str, Any]:
        """What unmerging has to put back; asked before `separate`, of leaders first."""
        if path in self.untied:
            return SharedBefore(_own(layer))
        return SharedBefore() if self.follows(path) else layer.base.keep(layer)

    def separate(self, path: str, layer: Any) -> None:
        """Give a layer that is untied its leader's new parameter, or one of its own, without values yet."""
        if path not in self.untied:
            return
        leader = self.follows(path)
        for name, parameter in _own(layer).items():
            if leader is None:
                setattr(layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
            else:
                setattr(layer, name, getattr(self._model.get_submodule(leader), name))


def _own(layer: nn.Module) -> dict[str, nn.Parameter]:
    base = base_of(layer)
    assert base is not None
    return base.stored(layer)


def _changes(modules: Mapping[str, nn.Module], path: str, names: Sequence[str]) -> Any:
    """What the named adapters make of the weight that the layer at `path` reads, by identity."""
    parents = [path.rsplit(".", up)[0] for up in range(path.count(".") + 1)]
    for parent in parents:
        module = modules[parent]
        live = module.copy_among(names) if isinstance(module, SavedModule) else None
        if live is not None and isinstance(module, SavedModule):
            inside = dict(base_modules(module.copies[live]))[path[len(parent) + 1 :]]
            return id(inside if base_of(inside) is None else next(iter(_own(inside).values())))
    layer = modules[path]
    if not isinstance(layer, AdaptedLayer):
        return ()
    units = {name: unit for name in names if (unit := layer.unit(name)) is not None}
    return tuple((name, unit.source or path) for name, unit in units.items())


def say_untied(config: Any) -> None:
    """Write into a transformers configuration that its model's weights are no longer tied.

    A class that takes no such word (T5's) is left alone: its models are read back untied where a checkpoint holds
    different weights.
    """
    ask = getattr(config, "get_text_config", None)
    for part in (config, ask() if ask is not None else None):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            again = type(part).from_dict({**part.to_dict(), "tie_word_embeddings": False})
            if not again.tie_word_embeddings:
                part.tie_word_embeddings = False
                logger.info("the merged weights are no longer tied: tie_word_embeddings=False in the configuration")
