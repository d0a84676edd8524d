"""What a quick start run measured, as a table for a person and as JSON for a program."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """Accuracies lie between 0 and 1, times are in seconds, sizes in bytes; None was not measured."""

    model: str
    method: str
    base: str
    device: str
    labels: int
    train_texts: int
    heldout_texts: int
    accuracy_before: float
    accuracy_after: float
    trainable_parameters: int
    all_parameters: int
    tokens_per_second: float
    step_adapted: float
    step_frozen: float
    step_plain_lora: float | None
    plain_lora_base: str
    peak_memory: int | None
    peak_gpu_memory: int | None
    adapter_bytes: int
    merged_bytes: int
    labels_that_agree: int
    largest_logit_difference: float

    def to_json(self) -> str:
        """Every figure, under its own name."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def table(self) -> str:
        """Title, then a row for each figure: what, value, remark."""
        rows = list(self._rows())
        what, value = (max(len(row[column]) for row in rows) for column in (0, 1))
        title = f"{self.method} on {self.model}, {self.base} base, {self.device}"
        lines = [f"{row[0]:<{what}}  {row[1]:>{value}}  {row[2]}".rstrip() for row in rows]
        rule = "-" * max(len(title), *map(len, lines))
        return "\n".join([title, rule, *lines, rule])

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        chance = f"chance is {1 / self.labels:.1%}"
        yield "held-out accuracy before", f"{self.accuracy_before:.1%}", f"untrained head; {chance}"
        yield (
            "held-out accuracy after",
            f"{self.accuracy_after:.1%}",
            f"{self.heldout_texts} texts, {self.labels} labels",
        )
        share = self.trainable_parameters / self.all_parameters
        parts = f"{self.trainable_parameters:,} of {self.all_parameters:,} parameters"
        yield "trainable share", f"{share:.2%}", parts
        yield "training speed", f"{self.tokens_per_second:,.0f} tokens/s", "optimizer and data included"
        yield "step, this adapter", _milliseconds(self.step_adapted), "forward and backward, median"
        yield (
            "step, frozen model",
            _milliseconds(self.step_frozen),
            f"adapter step is {self._times(self.step_frozen)}",
        )
        if self.step_plain_lora is not None:
            remark = f"{self.plain_lora_base} base; adapter step is {self._times(self.step_plain_lora)}"
            yield "step, plain torch LoRA", _milliseconds(self.step_plain_lora), remark
        if self.peak_memory is not None:
            yield "peak memory", _size(self.peak_memory), "this process, until training ended"
        if self.peak_gpu_memory is not None:
            yield "peak GPU memory", _size(self.peak_gpu_memory), "torch's, until training ended"
        yield "adapter file", _size(self.adapter_bytes), f"the merged model is {_size(self.merged_bytes)}"
        agreement = f"largest logit difference {self.largest_logit_difference:.1e}"
        yield "merged labels agree", f"{self.labels_that_agree} of {self.heldout_texts}", agreement

    def _times(self, other: float) -> str:
        return f"{self.step_adapted / other:.2f} x that"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
