"""The quick start from beginning to end: prepare, train, save, prove the merged model, time, write down."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import memory, plot, pretrained, training
from .figures import Figures
from .merged import logits_of_merged
from .options import SUMMARY_FILE, Options
from .output import folder_bytes, staged
from .plain_lora import add_plain_lora
from .preparation import Run, prepare
from .progress import progress_bar
from .timing import Candidate, step_times
from .training import History

if TYPE_CHECKING:
    from torch import Tensor

TIMED_ROUNDS = 7


def quickstart(options: Options) -> Figures:
    """Do all that `pyadapt quickstart` does but print the table.

    Raises:
        QuickstartError: options or data that cannot work; nothing is written.
        RuntimeError: the merged model could not be read by plain transformers.
    """
    run = prepare(options)
    counts = f"{len(run.split.train)} texts to train on, {len(run.heldout)} held out"
    _say(f"{run.model_name}, {options.base} base: {counts}, {len(run.split.labels)} labels")
    with staged(options.out) as stage:
        history, outputs = _train(run)
        # Before the comparison's second model is in memory.
        peaks = memory.peak_bytes(), memory.peak_gpu_bytes()
        _save(run, stage)
        _say("reading the merged model with plain transformers, in a process that cannot import pyadapt")
        plain_outputs = logits_of_merged(stage / "merged", run.heldout_texts, options.max_length)
        _say("timing a step against the frozen model and plain torch LoRA, in turns")
        steps = _time_steps(run)
        figures = _figures(run, history, peaks, steps, stage, outputs, plain_outputs)
        title = f"{run.model_name}, {options.base} base, {figures.method} of rank {options.rank}"
        plot.draw(history, 1 / figures.labels, title, stage / "training.png")
        (stage / SUMMARY_FILE).write_text(figures.to_json(), encoding="utf-8")
    return figures


def _train(run: Run) -> tuple[History, Tensor]:
    """The history, accuracy before and after every epoch included, and the last held-out outputs."""

    def ask() -> Tensor:
        return training.logits(run.model, run.heldout, run.collate, run.autocast)

    outputs = ask()
    accuracies = [(0, training.accuracy(outputs, run.heldout))]
    steps_an_epoch = len(run.batches) // run.options.epochs
    with progress_bar(len(run.batches)) as advance:

        def after_step(history: History) -> None:
            nonlocal outputs
            advance(history)
            if (step := len(history.losses)) % steps_an_epoch == 0:
                outputs = ask()
                accuracies.append((step, training.accuracy(outputs, run.heldout)))

        history = training.train(run.model, run.batches, run.collate, run.options.lr, run.autocast, after_step)
    history.accuracies = accuracies
    return history, outputs


def _save(run: Run, stage: Path) -> None:
    from .. import export

    run.model.save_pretrained(stage / "adapter")
    export(run.model, stage / "merged")
    run.tokenizer.save_pretrained(stage / "merged")


def _time_steps(run: Run) -> dict[str, float]:
    candidates = {
        "adapted": Candidate(run.model),
        "frozen": Candidate(run.model, run.model.disable_adapter),
    }
    options = run.options
    if options.method.lower() == "lora":
        dense = pretrained.read_model(run.source, run.split.labels, run.tokenizer.pad_token_id)
        dense = pretrained.set_base(dense.to(run.collate.device), _dense(options.base))
        add_plain_lora(dense, pretrained.heads(dense), options.rank, 2 * options.rank, pretrained.DROPOUT)
        candidates["plain"] = Candidate(dense)
    # The batch in the middle by length, among those that are full.
    full = [batch for batch in run.batches if len(batch) == len(run.batches[0])]
    typical = sorted(full, key=lambda batch: max(len(row.ids) for row in batch))[len(full) // 2]
    return step_times(candidates, run.collate(typical), run.autocast, TIMED_ROUNDS)


def _dense(base: str) -> str:
    return "fp32" if base == "int8" else base


def _figures(
    run: Run,
    history: History,
    peaks: tuple[int | None, int | None],
    steps: dict[str, float],
    stage: Path,
    outputs: Tensor,
    plain_outputs: Tensor,
) -> Figures:
    trainable, total = run.model.get_nb_trainable_parameters()
    return Figures(
        model=run.model_name,
        method=run.options.method.lower(),
        base=run.options.base,
        device=run.collate.device.type,
        labels=len(run.split.labels),
        train_texts=len(run.split.train),
        heldout_texts=len(run.heldout),
        accuracy_before=history.accuracies[0][1],
        accuracy_after=history.accuracies[-1][1],
        trainable_parameters=trainable,
        all_parameters=total,
        tokens_per_second=history.tokens_per_second,
        step_adapted=steps["adapted"],
        step_frozen=steps["frozen"],
        step_plain_lora=steps.get("plain"),
        plain_lora_base=_dense(run.options.base),
        peak_memory=peaks[0],
        peak_gpu_memory=peaks[1],
        adapter_bytes=folder_bytes(stage / "adapter"),
        merged_bytes=folder_bytes(stage / "merged"),
        labels_that_agree=int((plain_outputs.argmax(-1) == outputs.argmax(-1)).sum()),
        largest_logit_difference=float((plain_outputs - outputs).abs().max()),
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
