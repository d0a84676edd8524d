"""Putting virtual tokens before a text where it becomes vectors, and taking their positions out of the result again.

What lies behind, the head with its labels, logits, pooling by the ids, and losses, sees the text alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...anatomy.cache import cache_among
from ...distributed.sharding import call_inside
from ...tying import input_embedding

# Inputs that say something of each token, in which virtual tokens are zero.
_BY_TOKEN = ("token_type_ids", "bbox")


def with_prompt(owner: Any, prompt: Tensor, given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The arguments of a stack's forward with a prompt before the text.

    Args:
        owner: the stack.
        prompt: (n, d), or (B, n, d) with one for each row.
        given: the arguments by name.

    Returns:
        The arguments, and whether the prompt is among the states: with a cache it is there from the first call on.

    Raises:
        ValueError: the mask is none of two dimensions, to which n columns could be added.
    """
    n, cache = prompt.shape[-2], cache_among(given)
    inserted = cache is None or not bool(cache.get_seq_length())
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError("with virtual tokens the attention mask is to be the text's, of shape (rows, tokens)")
        given["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], n), mask], dim=1)
    positions = given.get("position_ids")
    if positions is not None:
        positions = positions + n
        if inserted:
            first = torch.arange(n, device=positions.device, dtype=positions.dtype)
            positions = torch.cat([first.expand(*positions.shape[:-1], n), positions], dim=-1)
        given["position_ids"] = positions
    if inserted:
        table: Any = input_embedding(owner)
        states = given.get("inputs_embeds")
        states = call_inside(owner, table, given["input_ids"]) if states is None else states
        rows = prompt.to(states.dtype).expand(states.shape[0], -1, -1)
        given["input_ids"], given["inputs_embeds"] = None, torch.cat([rows, states], dim=1)
        for name in _BY_TOKEN:
            value = given.get(name)
            if value is not None:
                given[name] = torch.cat([value.new_zeros(value.shape[0], n, *value.shape[2:]), value], dim=1)
    return given, inserted


def without_prompt(outputs: Any, n: int, keep_first: bool) -> Any:
    """The outputs of a stack without the first n positions.

    Args:
        outputs: a model output, or a tuple that begins with the hidden states.
        n: how many virtual tokens stand before the text.
        keep_first: let the first virtual token stand in the place of the text's first: what classifies an encoder's
            sequence reads that place, and in PEFT finds the virtual token there.
    """
    length = (outputs[0]).shape[1]

    def text(value: Any) -> Any:
        """A state (B, n + L, d) or a map of attention (B, H, n + L, keys) without the virtual tokens' rows."""
        if isinstance(value, tuple):
            return tuple(map(text, value))
        if not isinstance(value, Tensor) or value.dim() not in (3, 4) or value.shape[-2] != length:
            return value
        kept = value[..., n:, :]
        # A view of the middle is copied behind, or multiplied row by row: torch chooses by what is trained there, so
        # that a frozen head would round otherwise than the same one in training.
        return torch.cat([value[..., :1, :], kept[..., 1:, :]], dim=-2) if keep_first else kept.contiguous()

    if isinstance(outputs, tuple):
        return tuple(map(text, outputs))
    for name in ("last_hidden_state", "hidden_states", "attentions"):
        if outputs.get(name) is not None:
            outputs[name] = text(outputs[name])
    return outputs
