"""The units of methods whose prompt is put before the text's embeddings."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...layer import AdaptedLayer
from ...method import AdapterUnit, UnitBeside
from ...surgery import forward_arguments
from .insertion import with_prompt, without_prompt

# What part of the model a stack is.
ALONE, ENCODER, DECODER = "alone", "encoder", "decoder"


class InputPrompt(UnitBeside):
    """A prompt of n virtual tokens before the text.

    The encoder of an encoder-decoder gives the decoder the virtual tokens' states as well; the decoder is told that
    they may be seen, and may have a prompt of its own, the second n rows.

    Attributes:
        part: what the stack is: `ALONE`, `ENCODER` or `DECODER`.
        tokens: n.
    """

    # Whether a decoder behind an encoder gets virtual tokens too.
    prompts_decoder: ClassVar[bool] = False

    def __init__(self, config: Any, path: str, base: Any, layer: Any, *rest: Any) -> None:
        super().__init__(config, path, base, layer, *rest)
        self.part, self.tokens = config.parts[path], int(config.num_virtual_tokens)
        self.keeps_first = config.first_stands
        self.has_prompt = self._has_prompt(config, path)
        self.prepended = self.tokens if self.has_prompt and self.part != ENCODER else 0
        self.names = forward_arguments(layer)

    @classmethod
    def _has_prompt(cls, config: Any, path: str) -> bool:
        return config.parts[path] != DECODER or (cls.prompts_decoder and config.num_transformer_submodules == 2)

    @classmethod
    def shapes(cls, config: Any, path: str, base: Any, layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        return cls.prompt_shapes(config) if cls._has_prompt(config, path) else {}

    @classmethod
    @abc.abstractmethod
    def prompt_shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that make the prompt, by attribute."""

    @abc.abstractmethod
    def prompt(self, rows: int) -> Tensor:
        """The prompts of all parts of the model, (parts n, d), or (rows, parts n, d) where each row has its own."""

    @staticmethod
    def run(units: Sequence[nn.Module], owner: AdaptedLayer, *args: Any, **kwargs: Any) -> Any:
        """See `AdapterUnit.run`."""
        unit: Any = units[0]
        return unit(owner, {**dict(zip(unit.names, args, strict=False)), **kwargs})

    def forward(self, owner: AdaptedLayer, given: dict[str, Any]) -> Any:  # type: ignore[override]
        """The stack's outputs for a text with the prompt before it.

        Args:
            owner: the stack.
            given: the arguments of its forward by name.
        """
        if self.part == DECODER:
            _show_prompt(given, self.tokens)
        if not self.has_prompt:
            return owner.frozen(**given)
        entry = given.get("input_ids")
        prompt = self.prompt((given["inputs_embeds"] if entry is None else entry).shape[0])
        first = self.tokens if self.part == DECODER else 0
        given, inserted = with_prompt(owner, prompt[..., first : first + self.tokens, :], given)
        outputs = owner.frozen(**given)
        if not inserted or self.part == ENCODER:
            return outputs
        return without_prompt(outputs, self.tokens, self.keeps_first)

    @classmethod
    def check_together(cls, units: Mapping[str, AdapterUnit]) -> None:
        """See `AdapterUnit.check_together`: which prompt comes first is not defined."""
        if len(units) > 1:
            raise ValueError(f"adapters {' and '.join(map(repr, units))} each put a prompt before the text")

    def extra_repr(self) -> str:
        """The length, for `print(model)`."""
        return f"virtual_tokens={self.tokens}, part={self.part}"


def _show_prompt(given: dict[str, Any], n: int) -> None:
    """Let the decoder see the states of the encoder's virtual tokens."""
    mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
    if mask is not None and states is not None and mask.dim() == 2 and mask.shape[1] + n == states.shape[1]:
        given["encoder_attention_mask"] = nn.functional.pad(mask, (n, 0), value=1)
