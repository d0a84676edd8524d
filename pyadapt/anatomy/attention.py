"""Kinds of self-attention, and where a model has them."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from ..layer import base_modules
from ..surgery import original_class
from .attending import AdaptedAttention, check_implementation
from .part import Part

# Asked in order, before the one for all models that use the registry.
KINDS: list[type[Attention]] = []


class Attention(Part):
    """A self-attention of a transformers model that looks its function up in the registry."""

    name: ClassVar[str] = "attention"
    form: ClassVar[str] = "attention"
    mixin: ClassVar[type[nn.Module] | None] = AdaptedAttention
    # Whether an adapter's own attention is added to the module's output, behind the output projection (PEFT's GPT-2).
    adds_to_output: ClassVar[bool] = False

    @staticmethod
    def accepts(layer: Any) -> bool:
        """See `Host.accepts`."""
        cls: Any = original_class(layer)
        code = getattr(inspect.unwrap(cls.forward), "__code__", None)
        return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names

    @classmethod
    def heads(cls, layer: Any) -> tuple[int, int]:
        """(key/value heads, features a head)."""
        width: Any = next((size for name in _HEAD_SIZES if isinstance(size := getattr(layer, name, None), int)), None)
        projection = next((p for name in _KEYS if (p := getattr(layer, name, None)) is not None), None)
        features = getattr(projection, "out_features", None)
        count: Any = next((n for name in _HEAD_COUNTS if isinstance(n := getattr(layer, name, None), int)), None)
        if count is None:
            count = getattr(getattr(layer, "config", None), "num_attention_heads", None)
        if width is None and features is not None and count:
            width = features // count
        if not width or not (features or count):
            raise ValueError(f"a {type(layer).__name__} does not say how many heads of which size it has")
        return (features // width if features else count), width

    @classmethod
    def width(cls, layer: Any) -> int:
        """Features of the states that the module reads, d."""
        projection = next((p for name in _QUERIES if (p := getattr(layer, name, None)) is not None), None)
        width = getattr(projection, "in_features", None) or getattr(projection, "nf", 0) // 3
        return width or layer.config.hidden_size

    @classmethod
    def shape(cls, layer: Any) -> tuple[int, int]:
        """See `Host.shape`: features of a key, and of the states that the module reads."""
        heads, size = cls.heads(layer)
        return heads * size, cls.width(layer)

    @staticmethod
    def is_causal(layer: Any) -> bool:
        """Whether a query sees only the keys before it."""
        return bool(getattr(layer, "is_causal", False))

    @classmethod
    def check(cls, layer: Any) -> None:
        """Refuse an attention as it is set up now.

        Raises:
            ValueError: units cannot be led through it.
        """
        check_implementation(getattr(layer.config, "_attn_implementation", None))


class OwnAttention(Attention):
    """A self-attention that computes its products itself, in one way, to whose masks columns can be added."""

    @classmethod
    def check(cls, layer: Any) -> None:
        """See `Attention.check`."""


_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_HEAD_COUNTS = ("num_key_value_heads", "num_attention_heads", "num_heads", "n_heads")
_KEYS = ("k_proj", "key", "k", "key_proj")
_QUERIES = ("q_proj", "query", "q", "query_proj", "query_key_value", "in_proj", "c_attn")


def attention_of(layer: Any) -> type[Attention] | None:
    """The kind of self-attention that `layer` is, or None."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    kinds: list[type[Attention]] = [*KINDS, Attention]
    return next((kind for kind in kinds if kind.accepts(layer)), None)


def register(kind: type[Attention]) -> type[Attention]:
    """Class decorator: add a kind of attention that needs more than the registry."""
    KINDS.append(kind)
    return kind


def self_attentions(part: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module, type[Attention]]]:
    """(path, module, kind) of each self-attention in `part`, which lies at `prefix` in the model, in its order."""
    return [
        (f"{prefix}.{path}".strip("."), module, kind)
        for path, module in base_modules(part)
        if path and (kind := attention_of(module)) is not None and not _is_cross(path, module)
    ]


@contextlib.contextmanager
def saying(path: str) -> Iterator[None]:
    """Inside the block, what is wrong is said to be so of the module at `path`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_cross(path: str, module: nn.Module) -> bool:
    """Whether an attention reads its keys from another sequence."""
    names = (path.rpartition(".")[2], *path.split(".")[-2:-1], original_class(module).__name__)
    return bool(getattr(module, "is_cross_attention", False)) or any(
        mark in name.lower() for name in names for mark in ("cross", "encoder_attn", "encdecattention")
    )
