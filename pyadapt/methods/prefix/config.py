"""The configuration of prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...prompt_learning import PromptLearningConfig


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Configuration of prefix tuning; names and defaults are PEFT's. What is not listed: see `PromptLearningConfig`.

    Attributes:
        init_weights: "zero" starts from keys and values that are zero; None from N(0, 1).
        encoder_hidden_size: hidden features of the MLP that makes the prefix; None takes `token_dim`.
        num_transformer_submodules: for an encoder-decoder 2, PEFT's layout, is the default: of the L blocks of keys and
            values in a file, layer i of the decoder reads block 2 i mod L, so that with an even L two layers share
            each. 1 gives each layer a block of its own; PEFT cannot run that.
        prefix_projection: make the prefix by an MLP from embeddings of its tokens. Files hold what it made.
        widths: features of each layer's keys and values; worked out for a model.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    runtime_keys: ClassVar[tuple[str, ...]] = (*PromptLearningConfig.runtime_keys, "widths")

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    widths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("encoder_hidden_size")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f'init_weights={self.init_weights!r} is not None or "zero"')

    @property
    def blocks(self) -> list[int]:
        """Which block of a file's keys and values each layer reads; for a configuration that says everything."""
        layers = self.num_layers or 0
        return [(2 * i if self.num_transformer_submodules == 2 else i) % layers for i in range(layers)]
