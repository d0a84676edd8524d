"""Callbacks for transformers' Trainer; importing this file imports transformers."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model import AdaptedModel, is_wrapped

logger = logging.getLogger("pyadapt")


class AdaLoraCallback(TrainerCallback):
    """Calls `update_and_allocate` after each optimizer step of a Trainer, before gradients are zeroed.

    Give it to the Trainer: `Trainer(model, ..., callbacks=[pyadapt.AdaLoraCallback()])`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Warn where the Trainer takes another number of steps than the schedule was made for."""
        for name, config in _wrapped(model).peft_config.items():
            planned = getattr(config, "total_step", None)
            if planned is not None and not config.inference_mode and planned != state.max_steps:
                logger.warning(
                    "adapter %r was given total_step=%d, but the Trainer takes %d optimizer steps: the budget of ranks "
                    "reaches its end %s",
                    name,
                    planned,
                    state.max_steps,
                    "too early" if planned < state.max_steps else "not at all, or without the tfinal steps after it",
                )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take in the step that was just taken; the Trainer counts it only after this."""
        # Gradients that overflowed, so that the step was left out, are no measure of anything.
        if not getattr(optimizer, "step_was_skipped", False):
            _wrapped(model).update_and_allocate(state.global_step + 1)


def _wrapped(model: Any) -> AdaptedModel:
    while isinstance(model, nn.Module) and not is_wrapped(model):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise ValueError(f"AdaLoraCallback: this {type(model).__name__} carries no adapters of pyadapt")
        model = inner
    return model
