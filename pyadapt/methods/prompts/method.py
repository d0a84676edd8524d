"""What the methods of this package are to the rest: where the prompt goes, and what is in a file."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ...anatomy import Stack, position_modules, self_attentions, token_stacks
from ...base import Host
from ...config import TaskType
from ...prompt_learning import PromptMethod, check_length
from .unit import ALONE, DECODER, ENCODER


class InputPromptMethod(PromptMethod):
    """A method whose prompt is put before the text's embeddings."""

    prepends: ClassVar[bool] = True

    @classmethod
    def host(cls, layer: nn.Module) -> type[Host] | None:
        """See `LayerMethod.host`."""
        return Stack if Stack.accepts(layer) else None

    @staticmethod
    def places(config: Any, model: nn.Module) -> tuple[Any, list[str]]:
        """See `LayerMethod.places`: the stack that reads tokens, or an encoder and the decoder behind it."""
        config = config.with_saved(model)
        stacks = token_stacks(model)
        alone = len(stacks) == 1
        first = model.get_submodule(stacks[0])
        width = Stack.shape(first)[1]
        if config.token_dim not in (None, width):
            raise ValueError(
                f"token_dim={config.token_dim}: embeddings of this {type(model).__name__} have {width} features"
            )
        if config.num_transformer_submodules == 2 and alone:
            raise ValueError(f"num_transformer_submodules=2: this {type(model).__name__} is no encoder with a decoder")
        settings: Any = getattr(first, "config", None)
        attentions = self_attentions(first)
        looks_back = any(kind.is_causal(layer) for _, layer, kind in attentions)
        config = config.replaced(
            token_dim=width,
            num_transformer_submodules=config.num_transformer_submodules or _submodules(config, not alone),
            num_layers=config.num_layers or len(attentions) or None,
            num_attention_heads=config.num_attention_heads or getattr(settings, "num_attention_heads", None),
            encoder_hidden_size=getattr(config, "encoder_hidden_size", None) or width,
            parts=dict(zip(stacks, (ALONE,) if alone else (ENCODER, DECODER), strict=True)),
            first_stands=config.task_type == TaskType.SEQ_CLS and alone and not looks_back,
        )
        check_length(config, position_modules(first))
        return config, stacks


def total_tokens(config: Any) -> int:
    """Rows of the prompts of all parts of the model."""
    return config.num_virtual_tokens * config.num_transformer_submodules


def _submodules(config: Any, both: bool) -> int:
    """PEFT asks the task, not the model."""
    return 2 if both and config.task_type == TaskType.SEQ_2_SEQ_LM else 1
