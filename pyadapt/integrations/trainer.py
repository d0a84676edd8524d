"""A callback for transformers' Trainer that writes adapter files; importing this file imports transformers."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model import wrapped_inside


class AdapterCheckpoint(TrainerCallback):
    """Writes the adapter files into each of Trainer's checkpoints, under any engine.

    Trainer does so itself, but for FSDP with `SHARDED_STATE_DICT`, where it saves the engine's checkpoint alone.
    Give it to the Trainer: `Trainer(model, ..., callbacks=[pyadapt.AdapterCheckpoint()])`.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Gather the adapters, for which Trainer calls on every rank, and write them from the first."""
        inside = wrapped_inside(model)
        if inside is None:
            raise ValueError(f"AdapterCheckpoint: this {type(model).__name__} carries no adapters of pyadapt")
        folder = os.path.join(args.output_dir or ".", f"checkpoint-{state.global_step}")
        inside.save_pretrained(folder, is_main_process=args.should_save)
