"""A convolution's weight in a floating dtype: `torch.nn.Conv1d`, `Conv2d`, `Conv3d`, (out, in / groups, *kernel)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from ..surgery import original_class
from .floating import Floating
from .kind import Operands, check_at_hand, register

_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@register
class Conv(Floating):
    """`weight` with one row an output channel: (out, in / groups * prod(kernel))."""

    name = "conv"
    form: ClassVar[str] = "conv"

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `BaseWeight.accepts`; a subclass that does something else with its weight is not taken."""
        if not isinstance(layer, _CLASSES) or not layer.weight.is_floating_point():
            return False
        own: Any = original_class(layer)
        return any(own.forward is cls.forward and own._conv_forward is cls._conv_forward for cls in _CLASSES)

    @staticmethod
    def shape(layer: Any) -> tuple[int, int]:
        """See `BaseWeight.shape`; the layer's own numbers, since a sharding engine may hold an empty weight."""
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    @staticmethod
    def operands(layer: Any) -> Operands:
        """See `BaseWeight.operands`."""
        check_at_hand(layer)
        return Operands(layer.weight.flatten(1), None, layer.bias)

    @classmethod
    def plain(cls, layer: Any, matrix: Tensor) -> dict[str, Tensor]:
        """See `BaseWeight.plain`."""
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        return {"weight": matrix.to(cls.dtype(layer)).view(shape)}
