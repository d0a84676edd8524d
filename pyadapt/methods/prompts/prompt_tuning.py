"""Prompt tuning: the vectors of virtual tokens, trained themselves (Lester et al. 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ...config import AdapterConfig
from ...method import AdapterUnit, Preparation, refuse_data, register
from ...planning import Plan
from ...prompt_learning import PROMPT_KEY
from .config import PromptTuningConfig
from .method import InputPromptMethod, total_tokens
from .starts import from_text, from_vocabulary
from .unit import InputPrompt


class PromptUnit(InputPrompt):
    """The prompt itself.

    Attributes:
        embeddings: (parts n, d).
    """

    file_keys: ClassVar[dict[str, str]] = {"embeddings": PROMPT_KEY}
    embeddings: nn.Parameter

    @classmethod
    def prompt_shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See `InputPrompt.prompt_shapes`."""
        return {"embeddings": (total_tokens(config), config.token_dim)}

    def initialize(self, config: Any, path: str, base: Any, layer: Any) -> None:
        """N(0, 1); what looks at the vocabulary comes from `PromptTuning.prepare`."""
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def prompt(self, rows: int) -> Tensor:
        """See `InputPrompt.prompt`."""
        return self.embeddings


@register
class PromptTuning(InputPromptMethod):
    """Prompt tuning."""

    peft_type: ClassVar[str] = PromptTuningConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = PromptTuningConfig
    units: ClassVar[dict[str, type[AdapterUnit]]] = {"stack": PromptUnit}

    @staticmethod
    def prepare(plan: Plan, model: nn.Module, data: Any) -> Preparation:
        """See `LayerMethod.prepare`: embeddings of a text, or of tokens drawn from the vocabulary."""
        refuse_data(data)
        return Preparation(plan, start_values(plan, model))


def start_values(plan: Plan, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What the prompt starts from where that is something of the model's vocabulary; see `Preparation.values`."""
    config, path = plan.config, plan.layers[0].path
    stack = model.get_submodule(path)
    if config.from_text:
        return {path: {"embeddings": from_text(config, stack, total_tokens(config))}}
    if getattr(config.prompt_tuning_init, "value", None) == "SAMPLE_VOCAB":
        return {path: {"embeddings": from_vocabulary(stack, total_tokens(config))}}
    return {}
