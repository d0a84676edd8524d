"""What a method says of itself for its layers in kohya's and LyCORIS' files to be read."""

from __future__ import annotations

import abc
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import BaseWeight
from ..config import AdapterConfig
from ..layer_config import RankedConfig

# A file beside a method's own adds its reader with `@register`.
READERS: list[type[Reader]] = []


@dataclass(frozen=True)
class FileLayer:
    """What a file holds for one layer.

    Attributes:
        path: of the layer in the model.
        layer: the layer.
        base: the kind of its weight.
        tensors: by what follows the module's name in the file.
    """

    path: str
    layer: Any
    base: type[BaseWeight]
    tensors: dict[str, Tensor]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of a convolution's kernel; () for a linear layer."""
        return tuple(self.layer.kernel_size) if self.base.form == "conv" else ()

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a linear layer."""
        return self.layer.groups if self.base.form == "conv" else 1

    def need(self, *names: str) -> list[Tensor]:
        """The tensors of these names.

        Raises:
            ValueError: some are missing.
        """
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        return [self.tensors[name] for name in names]

    def rows(self, name: str) -> int:
        """The first size of the tensor called `name`, at least 1.

        Raises:
            ValueError: it is missing or no matrix, or is empty.
        """
        (tensor,) = self.need(name)
        if tensor.dim() < 2 or not len(tensor):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, and has to be a matrix")
        return len(tensor)

    def shaped(self, name: str, *shape: int) -> Tensor:
        """The tensor called `name` in this shape; ones at the end, which a kernel of 1 adds, may be there or not.

        Raises:
            ValueError: it is missing or has another shape.
        """
        (tensor,) = self.need(name)
        return reshaped(tensor, name, *shape)

    def kernel_factor(self, name: str, rank: int) -> Tensor:
        """The factor (r, r, *kernel) of a convolution that is taken apart; PEFT gives it two kernel dimensions.

        Raises:
            ValueError: it is missing or has another shape, or the layer is no convolution of one or two dimensions.
        """
        if len(self.kernel) not in (1, 2):
            raise ValueError(f"{name} takes a kernel apart, which is known of Conv1d and Conv2d alone")
        kernel = self.kernel if len(self.kernel) == 2 else (*self.kernel, 1)
        return self.shaped(name, rank, rank, *kernel)

    def refuse(self, name: str, what: str) -> None:
        """Refuse the layer if it has a tensor called `name`, which is `what`."""
        if name in self.tensors:
            raise ValueError(f"{name} is {what}")

    def alpha(self, rank: int) -> float:
        """The numerator of the scaling; LyCORIS takes the rank where there is none, or zero."""
        return (number("alpha", self.tensors["alpha"]) if "alpha" in self.tensors else 0.0) or float(rank)


@dataclass(frozen=True)
class FileUnit:
    """What a file's layer comes to here.

    Attributes:
        tensors: by what follows the layer's path in a PEFT file.
        rank: r of the layer; 0 where the method has none.
        alpha: of the layer.
        options: of the configuration; one value for all the layers of a file.
        form: what else the reader has to know of the layer to choose its options.
    """

    tensors: dict[str, Tensor]
    rank: int = 0
    alpha: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    form: Any = None


class Reader(abc.ABC):
    """Reads the layers of one method.

    Attributes:
        config_class: of the method here.
        marks: keys by which its layers are known, after the module's name.
        keys: all of its keys.
        scaled: keys of which the first that is there takes over the factor that older files keep as `scalar`.
    """

    config_class: ClassVar[type[AdapterConfig]]
    marks: ClassVar[frozenset[str]]
    keys: ClassVar[frozenset[str]]
    scaled: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abc.abstractmethod
    def read(cls, layer: FileLayer) -> FileUnit:
        """The tensors of one layer as they are here.

        Raises:
            ValueError: something is missing, does not fit the layer, or has no equivalent here.
        """

    @classmethod
    def options(cls, units: Mapping[str, FileUnit]) -> dict[str, Any]:
        """The options of the configuration, for all layers by path.

        Raises:
            ValueError: layers need different values.
        """
        agreed: dict[str, tuple[Any, str]] = {}
        for path, unit in units.items():
            for option, value in unit.options.items():
                first, where = agreed.setdefault(option, (value, path))
                if first != value:
                    raise ValueError(
                        f"{option} would have to be {first} for {where} and {value} for {path}; one adapter has one"
                    )
        return {option: value for option, (value, _) in agreed.items()}

    @classmethod
    def config(cls, units: Mapping[str, FileUnit], targets: list[str] | str) -> AdapterConfig:
        """The configuration of the adapter that these layers are."""
        assert issubclass(cls.config_class, RankedConfig)
        r = _usual(unit.rank for unit in units.values())
        alpha = _usual(unit.alpha for unit in units.values())
        patterns: dict[str, Any] = {
            "rank_pattern": {_just(path): unit.rank for path, unit in units.items() if unit.rank != r},
            "alpha_pattern": {_just(path): unit.alpha for path, unit in units.items() if unit.alpha != alpha},
        }
        usual: dict[str, Any] = {"r": r, cls.config_class.alpha_field: alpha, "target_modules": targets}
        return cls.config_class(**usual, **patterns, **cls.options(units))


def register(reader: type[Reader]) -> type[Reader]:
    """Class decorator: make a reader known by its marks."""
    READERS.append(reader)
    return reader


def number(name: str, tensor: Tensor) -> float:
    """The one finite value of a tensor."""
    if tensor.numel() != 1 or not tensor.isfinite():
        raise ValueError(f"{name} is {tensor.tolist()}, and has to be a finite number")
    return float(tensor)


def reshaped(tensor: Tensor, name: str, *shape: int) -> Tensor:
    """See `FileLayer.shaped`."""
    if _without_ones(tensor.shape) != _without_ones(shape):
        raise ValueError(f"{name} is {tuple(tensor.shape)}, and the layer needs {shape}")
    return tensor.reshape(shape)


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or float64 if it is that, for a product that the file does not hold."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def exactly(paths: Iterable[str]) -> str:
    """A regular expression that these paths match and no others."""
    return "|".join(re.escape(path) for path in paths)


def _without_ones(shape: Any) -> tuple[int, ...]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _usual(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _just(path: str) -> str:
    """A pattern that matches this path alone."""
    return f"^{re.escape(path)}"
