"""Which layers IA3 adapts, and which of them at their input, where the configuration does not say."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ...layer import base_modules
from ...targets import all_linear, matches

logger = logging.getLogger("pyadapt")

# Outputs, inputs (both are targets), and the values of `config.model_type` that they are for. The choices are those of
# PEFT, so that a file which leaves them to the library means the same layers in both.
_TABLE: list[tuple[list[str], list[str], list[str]]] = [
    (["k_proj", "v_proj"], ["down_proj"], ["llama", "mistral"]),
    (["q_proj", "v_proj"], ["down_proj"], ["llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"]),
    (["k_proj", "v_proj"], ["w2"], ["mixtral"]),
    (["q_proj", "k_proj"], ["fc2"], ["opt"]),
    (["q_proj", "v_proj"], ["fc2"], ["bart", "phi"]),
    (["q_proj", "v_proj"], ["fc_out"], ["gptj"]),
    (["q_proj", "v_proj"], ["c_proj"], ["gpt_neo"]),
    (["k", "v"], ["wo"], ["t5"]),
    (["k", "v", "wi_1"], [], ["mt5"]),
    (["c_attn"], ["mlp.c_proj"], ["gpt2", "gpt_bigcode"]),
    (["query_key_value"], ["mlp.dense_4h_to_h"], ["bloom"]),
    (["query_key_value"], ["dense_4h_to_h"], ["gpt_neox", "falcon", "RefinedWeb", "RefinedWebModel"]),
    (["key", "value"], ["output.dense"], ["bert", "roberta"]),
    (["key_proj", "value_proj"], ["output.dense"], ["deberta-v2"]),
    (["in_proj"], ["output.dense"], ["deberta"]),
]
DEFAULT_TARGETS = {model_type: sorted(outputs + inputs) for outputs, inputs, types in _TABLE for model_type in types}
DEFAULT_FEEDFORWARD = {model_type: inputs for _, inputs, types in _TABLE for model_type in types}

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_KEY_OR_VALUE = re.compile(r"(to_)?(k|v|key|value)(_?proj|_lin)?", re.IGNORECASE)
_FEEDFORWARD = re.compile(r"mlp|ffn?\d*|feed_?forward", re.IGNORECASE)


def default_targets(model: nn.Module) -> list[str] | None:
    """The targets for a model of a known type, else None."""
    return DEFAULT_TARGETS.get(_model_type(model))


def default_feedforward(model: nn.Module) -> list[str] | None:
    """Those of them that are scaled at their input."""
    return DEFAULT_FEEDFORWARD.get(_model_type(model))


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def by_structure(model: nn.Module) -> tuple[list[str], list[str]]:
    """What IA3 adapts in a model of no known type: (names of layers scaled at the output, at the input).

    At the output keys and values in attention modules, or all linear layers there where none is called so; at the input
    the last linear layer of each feed-forward module.
    """
    linear = all_linear(model)
    inside = [path for path in linear if _is_in_attention(path)]
    keys = [path for path in inside if _KEY_OR_VALUE.fullmatch(path.rpartition(".")[2])] or inside
    last: dict[str, str] = {}
    for path in linear:
        parts = path.split(".")
        depth = next((i for i, part in enumerate(parts[:-1]) if _FEEDFORWARD.fullmatch(part)), None)
        if depth is not None and path not in inside:
            last[".".join(parts[: depth + 1])] = path
    every = [path for path, _ in base_modules(model)]
    return _names(keys, every), _names(list(last.values()), every)


def _is_in_attention(path: str) -> bool:
    """Whether the nearest module around `path` that is one or the other is an attention, and no feed-forward module.

    diffusers keeps whole transformer blocks in a list called `attentions`.
    """
    around = reversed(path.split(".")[:-1])
    nearest = next((part for part in around if _ATTENTION.search(part) or _FEEDFORWARD.fullmatch(part)), "")
    return _ATTENTION.search(nearest) is not None


def _names(chosen: list[str], every: list[str]) -> list[str]:
    """The shortest dotted suffixes of one length that mean the modules at `chosen` and no other of `every`.

    None begins with a number, which says nothing by itself.
    """
    names: list[str] = []
    for length in range(1, max((path.count(".") for path in chosen), default=0) + 2):
        names = sorted({".".join(path.split(".")[-length:]) for path in chosen})
        meant = [path for path in every if matches(names, path)] == [path for path in every if path in chosen]
        if meant and not any(name[0].isdigit() for name in names):
            break
    return names


def as_expression(names: Iterable[str]) -> str:
    """A regular expression of whole paths that means what a list of dotted suffixes does."""
    return rf"(.*\.)?({'|'.join(re.escape(name) for name in names)})"


def tell(model: nn.Module, option: str, chosen: Any) -> None:
    """Say what was chosen for a model of no known type."""
    logger.warning("%s not given and %s is in no table: chose %s by structure", option, type(model).__name__, chosen)
