"""What methods that learn a prompt have in common: options, and the form of their files.

A file holds the finished prompt under one bare key, whatever made it in training, and modules that are trained whole
without the `model.` that other methods' keys have:

    prompt_embeddings                 (tokens, features)
    base_model.classifier.weight      and the like
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .anatomy import Positions
from .config import AdapterConfig
from .method import AdapterUnit, LayerMethod
from .targets import modules_to_save

PROMPT_KEY = "prompt_embeddings"
# What stands before the keys of modules that are trained whole.
_MODULES = "base_model."


@dataclass
class PromptLearningConfig(AdapterConfig):
    """Options of all methods that learn a prompt; names and meanings are those of PEFT.

    Attributes:
        num_virtual_tokens: length of the prompt.
        token_dim: features of a virtual token; None asks the model, as for the next three.
        num_transformer_submodules: 2 makes prompts for an encoder and a decoder, 1 for one of them.
        num_attention_heads: heads of keys and values.
        num_layers: layers with a prompt of their own.
        modules_to_save: modules that are trained whole and saved beside the prompt.
        finished: whether the prompt itself is held and trained, without what makes it; so it is after loading, as files
            hold nothing else.
    """

    runtime_keys: ClassVar[tuple[str, ...]] = (*AdapterConfig.runtime_keys, "finished")

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.modules_to_save, (set, frozenset, tuple)):
            self.modules_to_save = sorted(self.modules_to_save)
        self.check_counts("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers")
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ValueError(f"num_transformer_submodules={self.num_transformer_submodules!r} is not 1 or 2")

    def check_counts(self, *options: str) -> None:
        """Refuse options that are given, and are no whole numbers of at least 1."""
        for name in options:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")

    def with_saved(self, model: nn.Module) -> Any:
        """A copy in which the modules that are trained whole are named outright.

        Raises:
            ValueError: the length of the prompt is missing, or a name is not in the model.
        """
        if self.num_virtual_tokens is None:
            raise ValueError(f"{type(self).__name__} needs num_virtual_tokens, the length of the prompt")
        return self.replaced(modules_to_save=modules_to_save(self, model) or None)


def check_length(config: PromptLearningConfig, positions: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuse a prompt that leaves the text no positions.

    Args:
        config: its configuration.
        positions: (path, module) of what makes positions for the text.

    Raises:
        ValueError: so it is.
    """
    for path, module in positions:
        count = Positions.count(module)
        if count is not None and (config.num_virtual_tokens or 0) >= count:
            raise ValueError(
                f"num_virtual_tokens={config.num_virtual_tokens}: a prompt of this length leaves no positions for the "
                f"text ({path} has {count})"
            )


class PromptMethod(LayerMethod):
    """A method that learns a prompt."""

    has_own_keys: ClassVar[bool] = True
    # Key in a file -> what stands for it behind a unit's path; the first is the finished prompt.
    file_keys: ClassVar[tuple[str, ...]] = (PROMPT_KEY,)

    @classmethod
    def finish(cls, unit: AdapterUnit, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file is to hold of `unit`, by key in the file, with `tensors` as its parameters, by attribute."""
        raise NotImplementedError

    @classmethod
    def joined(cls, config: Any, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One adapter's tensors in the file, from those of its units (see `finish`)."""
        return {key: tensor for part in parts for key, tensor in part.items()}

    @classmethod
    def parted(cls, model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """(path of the host, key behind it) -> tensor, from those of a file.

        Raises:
            ValueError: the model has no place for them.
        """
        raise NotImplementedError

    @classmethod
    def read(
        cls, model: nn.Module, config: Any, tensors: dict[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """See `LayerMethod.read`."""
        config = config.replaced(finished=True)
        own = {key: tensor for key, tensor in tensors.items() if key in cls.file_keys}
        found = {f"{prefix}{path}.{key}": tensor for (path, key), tensor in cls.parted(model, config, own).items()}
        for key, tensor in tensors.items():
            if key not in own:
                found[prefix + key.removeprefix(_MODULES) if key.startswith(_MODULES) else key] = tensor
        return config, found

    @classmethod
    def as_saved(
        cls, model: Any, name: str, config: Any, tensors: dict[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """See `LayerMethod.as_saved`."""
        parts, taken = [], set()
        for path, unit in units_by_path(model, name):
            keys = {attribute: f"{prefix}{path}.{unit.file_keys[attribute]}" for attribute in _own(unit)}
            taken |= set(keys.values())
            if keys:
                with torch.no_grad():
                    parts.append(cls.finish(unit, {attribute: tensors[key] for attribute, key in keys.items()}))
        rest = {_MODULES + key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key not in taken}
        return config, {**cls.joined(config, parts), **rest}


def units_by_path(model: Any, name: str) -> list[tuple[str, AdapterUnit]]:
    """(path, unit) of each host that carries the adapter called `name`, in the model's order."""
    from .layer import adapted_layers

    found = ((path, layer.unit(name)) for path, layer in adapted_layers(model))
    return [(path, unit) for path, unit in found if unit is not None]


def _own(unit: AdapterUnit) -> list[str]:
    return [attribute for attribute, _ in unit.named_parameters(recurse=False)]
