"""Parameters that a module of no other kind keeps itself: all experts of a mixture in one tensor, or a router."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .kind import BaseWeight, Operands, is_conv1d, register

# What has a kind of its own, or (a recurrent layer) does not read its parameters by their names in forward.
_OTHER_KINDS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.RNNBase)


@register
class Experts(BaseWeight):
    """Floating parameters of two or three dimensions, each under a name of its own; most often (E, N, K), E experts.

    A module may have several, and `matrix` holds them all, side by side: a row for each expert where all have the same
    first dimension, else one row.
    """

    name: ClassVar[str] = "experts"
    form: ClassVar[str] = "experts"

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `BaseWeight.accepts`."""
        own_kind = isinstance(layer, _OTHER_KINDS) or is_conv1d(layer)
        return isinstance(layer, nn.Module) and not own_kind and bool(Experts.stored(layer))

    @staticmethod
    def shape(layer: Any) -> tuple[int, int]:
        """See `BaseWeight.shape`."""
        shapes = Experts.shapes(layer).values()
        first = {shape[0] for shape in shapes}
        rows = first.pop() if len(first) == 1 else 1
        return rows, sum(math.prod(shape) for shape in shapes) // rows

    @staticmethod
    def shapes(layer: Any) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by attribute; ZeRO-3 leaves an empty tensor in place and the shape beside it."""
        stored = Experts.stored(layer).items()
        return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in stored}

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        """See `BaseWeight.dtype`; that of the first parameter."""
        return next(iter(Experts.stored(layer).values())).dtype

    @staticmethod
    def operands(layer: Any) -> Operands:
        """There is no one matrix that a kernel could read.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(layer).__name__} has no weight of one matrix; its parameters are {', '.join(Experts.stored(layer))}"
        )

    @staticmethod
    def matrix(layer: Any) -> Tensor:
        """See `BaseWeight.matrix`."""
        stored = Experts.stored(layer)
        if any(parameter.is_meta for parameter in stored.values()):
            raise RuntimeError(
                f"the parameters of this {type(layer).__name__} are offloaded and at hand during its forward only; "
                "to merge, load the model without offloading to the CPU or the disk"
            )
        dtypes = [parameter.dtype for parameter in stored.values()]
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        matrix = torch.empty(Experts.shape(layer), dtype=wide, device=next(iter(stored.values())).device)
        for name, part in parts(matrix, Experts.shapes(layer)):
            part.copy_(stored[name].detach())
        return matrix

    @staticmethod
    def assign(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.assign`; in place, so that tied weights stay tied."""
        with torch.no_grad():
            for name, part in parts(matrix, Experts.shapes(layer)):
                getattr(layer, name).copy_(part)

    @staticmethod
    def make_dense(layer: Any, matrix: Tensor) -> None:
        """See `BaseWeight.make_dense`."""
        Experts.assign(layer, matrix)

    @classmethod
    def plain(cls, layer: Any, matrix: Tensor) -> dict[str, Tensor]:
        """See `BaseWeight.plain`."""
        stored = cls.stored(layer)
        return {
            name: part.to(stored[name].dtype, memory_format=torch.contiguous_format, copy=True)
            for name, part in parts(matrix, cls.shapes(layer))
        }

    @staticmethod
    def stored(layer: Any) -> dict[str, nn.Parameter]:
        """See `BaseWeight.stored`."""
        own = layer.named_parameters(recurse=False)
        return {
            name: parameter
            for name, parameter in own
            if parameter.is_floating_point() and len(getattr(parameter, "ds_shape", parameter.shape)) in (2, 3)
        }


def parts(matrix: Tensor, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """(attribute, view) of each parameter in `Experts.matrix`, in its own shape.

    Args:
        matrix: as `Experts.matrix` gives it.
        shapes: as `Experts.shapes` gives them.
    """
    widths = [math.prod(shape) // matrix.shape[0] for shape in shapes.values()]
    for (name, shape), part in zip(shapes.items(), matrix.split(widths, dim=1), strict=True):
        yield name, part.view(shape)
