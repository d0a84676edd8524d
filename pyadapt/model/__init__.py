"""What a wrapped model can do more, one file a subject."""

from __future__ import annotations

from typing import Any, TypeGuard, cast

from torch import nn

from ..surgery import adopt, is_adopted_by
from .calls import Calls
from .checkpoints import Checkpoints, take_state_dicts_without_base
from .diffusion import DiffusionVerbs
from .generation import Generation
from .ranks import Ranks
from .reports import Reports
from .saving import FileVerbs
from .schedules import Schedules
from .state import AdapterState, forget_adapters

__all__ = [
    "AdaptedDiffusion",
    "AdaptedGenerator",
    "AdaptedModel",
    "AdapterState",
    "forget_adapters",
    "is_wrapped",
    "make_adapted",
    "wrapped_inside",
]


class AdaptedModel(FileVerbs, Reports, Schedules, Calls, Ranks, Checkpoints):
    """Mixin of a wrapped model. The object, its class name and its state-dict keys stay those of the user's model."""


class AdaptedGenerator(Generation, AdaptedModel):
    """Mixin of a wrapped model that generates."""


class AdaptedDiffusion(DiffusionVerbs, AdaptedModel):
    """Mixin of a wrapped model of diffusers."""


def is_wrapped(model: nn.Module) -> TypeGuard[AdaptedModel]:
    """Whether `model` carries adapters of pyadapt."""
    return is_adopted_by(model, AdaptedModel)


def wrapped_inside(model: Any) -> AdaptedModel | None:
    """The wrapped model that `model` is, or that an engine or torch.compile has inside; None where there is none."""
    while isinstance(model, nn.Module) and not is_wrapped(model):
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    return model


def make_adapted(model: nn.Module) -> AdaptedModel:
    """Turn a plain model into an adapted one that has no adapters yet: its weights are frozen."""
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    checkpointing = _is_checkpointing(model)
    model = adopt(model, _mixin(model))
    model.peft_config = {}
    model.adapter_state = AdapterState(trained_before=trained)
    model._hf_peft_config_loaded = True
    take_state_dicts_without_base(model)
    model.requires_grad_(False)
    if checkpointing and hasattr(model, "enable_input_require_grads"):
        # A checkpointed block whose inputs need no gradient is skipped by backward, and nothing would train; diffusers
        # recomputes in the way that does not ask for it.
        cast(Any, model).enable_input_require_grads()
    return model


def _mixin(model: nn.Module) -> type[AdaptedModel]:
    if hasattr(model, "generate"):
        return AdaptedGenerator
    # A name that diffusers' models have, and no others.
    return AdaptedDiffusion if hasattr(model, "load_lora_adapter") else AdaptedModel


def _is_checkpointing(model: nn.Module) -> bool:
    """Whether transformers (whose version 5 changed the name) or diffusers recomputes activations in this model."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    known = next((name for name in names if hasattr(type(model), name)), None)
    return known is not None and bool(getattr(model, known))
