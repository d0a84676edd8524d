"""Preparing a quantised model for training, as PEFT does before it wraps one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .base import base_of
from .base.int8 import Int8Layer
from .integrations.transformers import is_transformers_model
from .layer import base_modules, saved_modules
from .model import is_wrapped

# Quantisation methods whose 16-bit parameters belong to the quantised layers, and are not cast.
_LEFT_IN_16_BITS = ("gptq", "aqlm", "eetq", "hqq", "torchao")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a model, hold what is not quantised in fp32, and recompute activations if it is quantised.

    fp32 norms and heads keep a quantised model's training stable; quantised weights stay what they are. It is called
    before `wrap`; a wrapped model is prepared in the same way, its adapters go on training.

    Args:
        model: a model, quantised or not; recomputing needs one of transformers.
        use_gradient_checkpointing: whether a quantised model recomputes activations in backward.
        gradient_checkpointing_kwargs: passed to `torch.utils.checkpoint.checkpoint`. Unless it says `use_reentrant`
            False, the output of the input embeddings is made to require gradients, without which nothing would train.
        auto_clear_cache: give the memory of the 16-bit parameters back to the GPU.

    Returns:
        `model`.

    Raises:
        ValueError: activations are to be recomputed in a model that does not know how; nothing was changed.
    """
    quantised = any((base := base_of(module)) is not None and base.quantized for module in model.modules())
    method = getattr(model, "quantization_method", None)
    recompute = use_gradient_checkpointing and (quantised or method in _LEFT_IN_16_BITS)
    if recompute and not is_transformers_model(model):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers, and so cannot recompute activations at a word: "
            "pass use_gradient_checkpointing=False and use torch.utils.checkpoint where you call its blocks"
        )
    for parameter in _base_parameters(model):
        parameter.requires_grad_(False)
    if method not in _LEFT_IN_16_BITS:
        _hold_in_fp32(model)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if recompute:
        _recompute(model, dict(gradient_checkpointing_kwargs or {}))
    return model


prepare_model_for_int8_training = prepare_model_for_kbit_training


def _base_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the user's model, without those of adapters."""
    if not is_wrapped(model):
        return model.parameters()
    return itertools.chain.from_iterable(module.parameters(recurse=False) for _, module in base_modules(model))


def _hold_in_fp32(model: nn.Module) -> None:
    copies = [module.copies.modules() for _, module in saved_modules(model)]
    for module in itertools.chain((module for _, module in base_modules(model)), *copies):
        base = base_of(module)
        quantised = set(base.stored(module)) if base is not None and base.quantized else set()
        for name, parameter in module.named_parameters(recurse=False):
            # In place, so that tied parameters stay tied and optimizers keep theirs.
            if name not in quantised and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)
        if isinstance(module, Int8Layer) and module.dense_dtype in (torch.float16, torch.bfloat16):
            # The input is fp32 from now on, and so must be the dense layer that a merge makes of it.
            module.dense_dtype = torch.float32


def _recompute(model: Any, kwargs: dict[str, Any]) -> None:
    # torch wants it said outright, and leaves it to True.
    kwargs.setdefault("use_reentrant", True)
    if kwargs["use_reentrant"]:
        model.enable_input_require_grads()
    # transformers gave it another name in its version 5.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(kwargs)
