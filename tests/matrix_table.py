"""The columns of the matrix of models, and what cannot be in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from models.zoo import Row
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """A column of the matrix.

    Attributes:
        name: what the column is called.
        options: its configuration.
        on_layers: whether it adapts single layers: it takes the row's options, and merges.
        extra: further arguments of each call.
    """

    name: str
    options: dict[str, Any]
    on_layers: bool = True
    extra: dict[str, Tensor] = field(default_factory=dict)


METHODS = [
    Method("LoRA", {"peft_type": "LORA", "r": 3}),
    Method("AdaLoRA", {"peft_type": "ADALORA", "init_r": 3, "target_r": 2, "total_step": 100}),
    Method("IA3", {"peft_type": "IA3"}),
    Method("LoHa", {"peft_type": "LOHA", "r": 2}),
    Method("LoKr", {"peft_type": "LOKR", "r": 2}),
    Method("prefix tuning", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, on_layers=False),
    Method("P-tuning", {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8}, on_layers=False),
    Method("prompt tuning", {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, on_layers=False),
    Method(
        "multitask prompt tuning",
        {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 1},
        on_layers=False,
        extra={"task_ids": torch.tensor([0, 1])},
    ),
    Method("LLaMA-Adapter", {"peft_type": "ADAPTION_PROMPT", "adapter_len": 3, "adapter_layers": 2}, on_layers=False),
]
# Those that put vectors before those of the text.
_INPUT_PROMPTS = ("P-tuning", "prompt tuning", "multitask prompt tuning")


@dataclass(frozen=True)
class Known:
    """Something that cannot be, of some cells.

    Attributes:
        reason: a sentence.
        cells: of which cells it is true.
    """

    reason: str
    cells: Callable[[Row, Method], bool]


# Kinds of rows that read no text, and those with a decoder; and the one row that reads token ids alone.
_NO_TEXT = ("vision", "diffusion", "plain")
_DECODING = ("decoder", "encoder-decoder", "speech")
_CLIP = "its text encoder"

# What `wrap` refuses: the reason is its message, with {model} for the class of the model, {part} for that of a part.
REFUSED = [
    Known(
        "this {model} has no self-attention of transformers, so there is nothing that could see a prefix",
        lambda row, method: method.name == "prefix tuning" and row.kind in ("diffusion", "plain"),
    ),
    Known(
        "the {part} of this {model} takes no vectors in the place of token ids, so a prompt has nowhere to go",
        lambda row, method: method.name in _INPUT_PROMPTS and (row.kind in _NO_TEXT or row.name == _CLIP),
    ),
    Known(
        "LLaMA-Adapter is for decoders: no self-attention of this {model} says that it looks back alone",
        lambda row, method: method.name == "LLaMA-Adapter" and row.kind not in _DECODING,
    ),
]
# What peft cannot do with a file of ours: its own call fails, or its outputs differ.
PEFT_FAILS = [
    Known(
        "PEFT has no LoHa and no LoKr on GPT-2's Conv1D layers.",
        lambda row, method: row.name == "GPT-2" and method.name in ("LoHa", "LoKr"),
    ),
    Known(
        "PEFT's prompts need a model with a vocabulary.",
        lambda row, method: not method.on_layers and row.kind == "vision",
    ),
    Known(
        "PEFT puts no prompt before a text without a task type.",
        lambda row, method: not method.on_layers and row.name == _CLIP,
    ),
    Known(
        "PEFT puts a prompt before the ids of a text, and calls the model with them.",
        lambda row, method: (method.name == "prefix tuning" or method.name in _INPUT_PROMPTS) and row.kind == "speech",
    ),
    Known(
        "PEFT's prefix needs a model that takes past keys and values, and this one takes none.",
        lambda row, method: method.name == "prefix tuning" and row.name in ("DeBERTa", "DeBERTa-v2", "LayoutLM"),
    ),
    Known(
        "PEFT gives the prompt no place on the page (`bbox`).",
        lambda row, method: method.name in _INPUT_PROMPTS and row.name == "LayoutLM",
    ),
    Known(
        "PEFT's model for this task does not hand task_ids to the prompt.",
        lambda row, method: method.extra != {} and row.section in ("QUESTION_ANS", "FEATURE_EXTRACTION"),
    ),
    Known(
        "PEFT's model for this task names a head to be trained, which its LLaMA-Adapter has no option for.",
        lambda row, method: (
            method.name == "LLaMA-Adapter" and row.name == "GPT-2" and row.section in ("TOKEN_CLS", "QUESTION_ANS")
        ),
    ),
    Known(
        "PEFT's LLaMA-Adapter knows Llama, Mistral and GPT-2 alone.",
        lambda row, method: method.name == "LLaMA-Adapter" and row.name not in ("Llama", "Mistral", "GPT-2"),
    ),
]


def known(table: list[Known], row: Row, method: Method) -> str:
    """The reason of the first entry of `table` for the cell; empty where there is none."""
    return next((entry.reason for entry in table if entry.cells(row, method)), "")
