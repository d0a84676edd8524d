"""The parts of a transformer that prompts act on: its attention, its positions, and where tokens become vectors.

Each is a kind of `Host`, as a layer's weight is: units are put on such modules and are called with them. What differs
between models is here, in one place; a method never asks what model it is in.
"""

from __future__ import annotations

from ..discovery import import_submodules
from .attending import AdaptedAttention, AttentionCall, AttentionUnit, Core
from .attention import attention_of, saying, self_attentions
from .blocks import Blocks, blocks_of
from .positions import Positions, PositionUnit, position_modules
from .stack import Stack, decoder_of, token_stacks

# Each kind of attention registers itself.
import_submodules(__name__, __path__)

__all__ = [
    "AdaptedAttention",
    "AttentionCall",
    "AttentionUnit",
    "Blocks",
    "Core",
    "PositionUnit",
    "Positions",
    "Stack",
    "attention_of",
    "blocks_of",
    "decoder_of",
    "position_modules",
    "saying",
    "self_attentions",
    "token_stacks",
]
