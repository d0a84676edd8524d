"""What a prompt starts from: a text, the vocabulary, or prompts of other tasks."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed.sharding import whole
from ...files import AdapterFileError, adapter_weights_path, read_tensors
from ...prompt_learning import PROMPT_KEY
from ...tying import input_embedding


def from_text(config: Any, stack: nn.Module, rows: int) -> Tensor:
    """The embeddings of the first tokens of a text, (rows, d) fp32; a part after the first goes on in the text.

    Raises:
        ValueError: the tokenizer cannot be loaded, or the text has fewer tokens than the prompt.
    """
    ids = _tokens(config)
    if len(ids) < config.num_virtual_tokens:
        raise ValueError(
            f"num_virtual_tokens={config.num_virtual_tokens}, but prompt_tuning_init_text has {len(ids)} tokens: give "
            f"a longer text, or num_virtual_tokens={len(ids)}"
        )
    table: Any = input_embedding(stack)
    wanted = torch.tensor(ids).repeat(-(-rows // len(ids)))[:rows]
    if int(wanted.max()) >= table.num_embeddings:
        raise ValueError(
            f"the tokenizer {config.tokenizer_name_or_path!r} gives token {int(wanted.max())}, and the model has "
            f"{table.num_embeddings}: it is another model's"
        )
    return _looked_up(table, wanted)


def from_vocabulary(stack: nn.Module, rows: int) -> Tensor:
    """The embeddings of tokens drawn from the vocabulary, (rows, d) fp32."""
    table: Any = input_embedding(stack)
    return _looked_up(table, torch.randint(0, table.num_embeddings, (rows,)))


def source_tensors(path: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a source adapter's file.

    Args:
        path: the file, or the folder that it lies in.
        shapes: what is asked for; the first size of the tasks' matrices may differ.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        tensors = read_tensors(adapter_weights_path(path) if os.path.isdir(path) else path)
    except (AdapterFileError, OSError) as error:
        raise ValueError(f"prompt_tuning_init_state_dict_path={path!r}: {error}") from error
    for key, shape in shapes.items():
        found = tuple(tensors[key].shape) if key in tensors else None
        same = found is not None and (found == shape if key == PROMPT_KEY else found[1:] == shape[1:])
        if not same:
            raise ValueError(
                f"prompt_tuning_init_state_dict_path={path!r}: {key} is {'missing' if found is None else found}, "
                f"wanted {shape if key == PROMPT_KEY else ('tasks', *shape[1:])}"
            )
    return tensors


def _tokens(config: Any) -> list[int]:
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **(config.tokenizer_kwargs or {}))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer_name_or_path={name!r} cannot be loaded: {error}") from error
    return list(tokenizer(config.prompt_tuning_init_text)["input_ids"])


def _looked_up(table: Any, ids: Tensor) -> Tensor:
    """Through the table's own forward, which may scale its rows."""
    with torch.no_grad(), whole(table, [table]):
        return table(ids.to(table.weight.device)).float()
