"""The module that runs a model's blocks one after the other, as a host of what all of them are given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from .part import Part


class Blocks(Part):
    """The innermost module that has a forward of its own and holds all of some modules."""

    name: ClassVar[str] = "blocks"
    form: ClassVar[str] = "blocks"

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        return not isinstance(layer, (nn.ModuleList, nn.ModuleDict))

    @staticmethod
    def shape(layer: Any) -> tuple[int, int]:
        """See `Host.shape`: it computes nothing itself."""
        return 0, 0


def blocks_of(model: nn.Module, paths: Sequence[str]) -> str:
    """Path of the `Blocks` that hold the modules at `paths`."""
    parents = [path.split(".")[:-1] for path in paths]
    levels = zip(*parents, strict=False)
    common = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels)]
    while common and not Blocks.accepts(model.get_submodule(".".join(common))):
        common = common[:-1]
    return ".".join(common)
