"""The configurations of methods whose prompt is put before the text's embeddings."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...prompt_learning import PromptLearningConfig


class PromptTuningInit(str, enum.Enum):
    """What a prompt starts from: N(0, 1), the embeddings of a text, or those of tokens drawn from the vocabulary."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(str, enum.Enum):
    """What a multitask prompt starts from: a text, N(0, 1), or what was learnt on source tasks.

    Of the source tasks: the mean of their matrices, those of one of them, or the shared prompt alone.
    """

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(str, enum.Enum):
    """What makes the prompt of P-tuning from embeddings."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class InputPromptConfig(PromptLearningConfig):
    """What the methods of this package share. What is not listed: see `PromptLearningConfig`.

    Attributes:
        parts: path of each stack -> what it is; worked out for a model.
        first_stands: whether the first virtual token stands in the place of the text's first for what classifies a
            sequence; worked out for a model.
    """

    runtime_keys: ClassVar[tuple[str, ...]] = (*PromptLearningConfig.runtime_keys, "parts", "first_stands")

    parts: dict[str, str] = field(default_factory=dict)
    first_stands: bool = False

    def choice(self, option: str, kinds: type[enum.Enum]) -> None:
        """Turn the value of `option` into one of `kinds`.

        Raises:
            ValueError: it is none.
        """
        value = getattr(self, option)
        try:
            setattr(self, option, kinds(value))
        except ValueError:
            names = ", ".join(str(kind.value) for kind in kinds)
            raise ValueError(f"{option}={value!r} is not one of {names}") from None


@dataclass
class PromptTuningConfig(InputPromptConfig):
    """Configuration of prompt tuning; names and defaults are those of PEFT. What is not listed: `PromptLearningConfig`.

    Attributes:
        prompt_tuning_init: what the prompt starts from, a `PromptTuningInit` or its name.
        prompt_tuning_init_text: the text, for TEXT; of at least as many tokens as the prompt.
        tokenizer_name_or_path: the tokenizer that reads it.
        tokenizer_kwargs: options for loading the tokenizer.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    init_kinds: ClassVar[type[enum.Enum]] = PromptTuningInit

    prompt_tuning_init: PromptTuningInit | MultitaskPromptTuningInit | str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice("prompt_tuning_init", self.init_kinds)
        if self.from_text:
            for option in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, option):
                    raise ValueError(f"prompt_tuning_init=TEXT needs {option}")
        elif self.tokenizer_kwargs:
            raise ValueError("tokenizer_kwargs is for prompt_tuning_init=TEXT alone")
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            raise ValueError(
                "tokenizer_kwargs: trust_remote_code would run code that a file names; load the tokenizer "
                "once yourself, save it, and give its folder"
            )

    @property
    def from_text(self) -> bool:
        """Whether the prompt starts from a text."""
        return getattr(self.prompt_tuning_init, "value", None) == "TEXT"


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Configuration of multitask prompt tuning; names and defaults are those of PEFT.

    Attributes:
        prompt_tuning_init: what the prompt starts from, a `MultitaskPromptTuningInit` or its name.
        prompt_tuning_init_state_dict_path: file of the adapter of the source tasks, for what starts from these.
        prompt_tuning_init_task: index of the source task, for EXACT_SOURCE_TASK.
        num_ranks: rank of each task's matrix.
        num_tasks: how many tasks there are; a call of the model says which row is of which by `task_ids`.
    """

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    init_kinds: ClassVar[type[enum.Enum]] = MultitaskPromptTuningInit

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("num_ranks", "num_tasks")
        if self.from_source and not self.prompt_tuning_init_state_dict_path:
            raise ValueError(
                f"prompt_tuning_init={getattr(self.prompt_tuning_init, 'value', None)} needs "
                "prompt_tuning_init_state_dict_path, the file of the source tasks' adapter"
            )

    @property
    def from_source(self) -> bool:
        """Whether the prompt starts from what was learnt on source tasks."""
        return getattr(self.prompt_tuning_init, "value", None) not in ("TEXT", "RANDOM")


@dataclass
class PromptEncoderConfig(InputPromptConfig):
    """Configuration of P-tuning; names and defaults are those of PEFT. What is not listed: `PromptLearningConfig`.

    Attributes:
        encoder_reparameterization_type: what makes the prompt, a `PromptEncoderReparameterizationType` or its name.
        encoder_hidden_size: hidden features of that; None takes `token_dim`.
        encoder_num_layers: layers of the LSTM; the MLP has three products whatever it says, as in PEFT.
        encoder_dropout: dropout between the LSTM's layers, in [0, 1).
    """

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice("encoder_reparameterization_type", PromptEncoderReparameterizationType)
        self.check_counts("encoder_hidden_size", "encoder_num_layers")
        if not 0.0 <= self.encoder_dropout < 1.0:
            raise ValueError(f"encoder_dropout={self.encoder_dropout!r} is not in [0, 1)")
