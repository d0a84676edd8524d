"""Callbacks for transformers' Trainer; importing this file imports transformers."""

from __future__ import annotations

import logging
import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model import AdaptedModel, wrapped_inside

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


class AdapterCheckpoint(TrainerCallback):
    """Writes the adapter files into each of Trainer's checkpoints, under any engine.

    Trainer does so itself, but for FSDP with `SHARDED_STATE_DICT`, where it saves the engine's checkpoint alone.
    Give it to the Trainer: `Trainer(model, ..., callbacks=[pyadapt.AdapterCheckpoint()])`.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Gather the adapters, for which Trainer calls on every rank, and write them from the first."""
        inside = _wrapped(model)
        folder = os.path.join(args.output_dir or ".", f"checkpoint-{state.global_step}")
        inside.save_pretrained(folder, is_main_process=args.should_save)


def _wrapped(model: Any) -> AdaptedModel:
    inside = wrapped_inside(model)
    if inside is None:
        raise ValueError(f"a callback of pyadapt: this {type(model).__name__} carries no adapters of pyadapt")
    return inside
