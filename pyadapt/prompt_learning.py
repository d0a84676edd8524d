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
from .layer import adapted_layers
from .method import LayerMethod
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
    # The keys of a file that belong to the prompt.
    file_keys: ClassVar[tuple[str, ...]] = (PROMPT_KEY,)

    @classmethod
    def finish(cls, unit: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file is to hold of `unit`, by key in the file, with `tensors` as its parameters, by attribute."""
        return {unit.file_keys[attribute]: tensor for attribute, tensor in tensors.items()}

    @classmethod
    def read(
        cls, model: nn.Module, config: Any, tensors: dict[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """See `LayerMethod.read`: the prompt belongs to the first of the adapter's units."""
        config = config.replaced(finished=True)
        places: Any = cls.places(config, model)
        found = {}
        for key, tensor in tensors.items():
            if key in cls.file_keys:
                key = f"{prefix}{places[1][0]}.{key}"
            elif key.startswith(_MODULES):
                key = prefix + key.removeprefix(_MODULES)
            found[key] = tensor
        return config, found

    @classmethod
    def as_saved(
        cls, model: Any, name: str, config: Any, tensors: dict[str, Tensor], prefix: str
    ) -> tuple[Any, dict[str, Tensor]]:
        """See `LayerMethod.as_saved`."""
        found: dict[str, Tensor] = {}
        taken: set[str] = set()
        for path, layer in adapted_layers(model):
            unit: Any = layer.unit(name)
            own = [] if unit is None else list(unit.weights())
            keys = {attribute: f"{prefix}{path}.{unit.file_keys[attribute]}" for attribute in own}
            taken |= set(keys.values())
            # A unit after the first shares the parameters of that.
            if keys and not found:
                with torch.no_grad():
                    found = cls.finish(unit, {attribute: tensors[key] for attribute, key in keys.items()})
        rest = {_MODULES + key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key not in taken}
        return config, {**found, **rest}
