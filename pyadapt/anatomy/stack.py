"""Where tokens become vectors: the modules of a transformers model that an input prompt is put into."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..base import Host
from ..layer import base_modules
from ..surgery import forward_arguments
from ..tying import input_embedding


class Stack(Host):
    """A module that takes token ids or their embeddings and gives hidden states: an encoder, a decoder."""

    name: ClassVar[str] = "stack"
    form: ClassVar[str] = "stack"

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        reads = {"input_ids", "inputs_embeds"} <= set(forward_arguments(layer))
        return reads and isinstance(input_embedding(layer), nn.Embedding)

    @staticmethod
    def shape(layer: Any) -> tuple[int, int]:
        """See `Host.shape`: features of an input embedding, twice."""
        table: Any = input_embedding(layer)
        return table.embedding_dim, table.embedding_dim

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        """See `Host.dtype`."""
        table: Any = input_embedding(layer)
        return table.weight.dtype

    @staticmethod
    def stored(layer: Any) -> dict[str, nn.Parameter]:
        """See `Host.stored`: the table of input embeddings."""
        table: Any = input_embedding(layer)
        return {"weight": table.weight}


def token_stacks(model: Any) -> list[str]:
    """Paths of the modules that embed tokens and run blocks: one; or an encoder, and the decoder that reads its states.

    Of an encoder-decoder that hears or sees (Whisper), the decoder alone reads tokens.

    Raises:
        ValueError: the model reads something else than tokens.
    """
    decoder = decoder_of(model)
    if decoder is not None:
        encoder = model.get_encoder()
        readers = [path_of(model, encoder)] if Stack.accepts(encoder) else []
        return [*readers, _checked(model, model.get_submodule(decoder))]
    part = getattr(model, "base_model", model)
    path = _checked(model, part)
    # A model around a decoder of its own (OPT) is passed by where a head is put on that.
    inner = [name for name, child in part.named_children() if Stack.accepts(child)]
    return [f"{path}.{inner[0]}".strip(".") if len(inner) == 1 else path]


def decoder_of(model: Any) -> str | None:
    """Path of the decoder of a sequence-to-sequence model; None for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    return path_of(model, model.get_decoder())


def path_of(model: nn.Module, part: nn.Module) -> str:
    """Path of the module `part` in `model`; empty for the model itself."""
    return next(path for path, module in base_modules(model) if module is part)


def _checked(model: nn.Module, part: Any) -> str:
    if not Stack.accepts(part):
        raise ValueError(
            f"the {type(part).__name__} of this {type(model).__name__} takes no vectors in the place of token ids, "
            "so a prompt has nowhere to go"
        )
    return path_of(model, part)
