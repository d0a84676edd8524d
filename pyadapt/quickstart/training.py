"""The training loop: batches of texts of like length, AdamW, a warm-up and a straight descent to zero."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import QuickstartError
from .examples import Example

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WARMUP_SHARE = 0.1
# Texts of so many batches are sorted by length before they are cut: little padding, still shuffled.
SORTED_BATCHES = 8
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Encoded:
    """A text as token ids, and the index of its label."""

    ids: list[int]
    label: int


@dataclass
class History:
    """What happened: a loss each step, and (step, accuracy) each time the held-out texts were asked."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on a second, padding not counted."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Collator:
    """Pads encoded texts to the longest among them and puts them on the device."""

    def __init__(self, tokenizer: Any, device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.device = device

    def __call__(self, rows: list[Encoded]) -> dict[str, Tensor]:
        """Model inputs, `labels` among them: (B, T) and (B,)."""
        import torch

        batch = self.tokenizer.pad({"input_ids": [row.ids for row in rows]}, return_tensors="pt")
        batch["labels"] = torch.tensor([row.label for row in rows])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def encode(tokenizer: Any, examples: list[Example], labels: list[str], max_length: int) -> list[Encoded]:
    """Token ids of each example, cut after `max_length`."""
    index = {label: position for position, label in enumerate(labels)}
    ids = tokenizer([example.text for example in examples], truncation=True, max_length=max_length)["input_ids"]
    return [Encoded(row, index[example.label]) for row, example in zip(ids, examples, strict=True)]


def epoch_batches(rows: list[Encoded], size: int, draw: random.Random) -> list[list[Encoded]]:
    """Every row once, in batches of like length, in a drawn order."""
    rows = draw.sample(rows, len(rows))
    batches = []
    for start in range(0, len(rows), size * SORTED_BATCHES):
        run = sorted(rows[start : start + size * SORTED_BATCHES], key=lambda row: len(row.ids))
        batches += [run[first : first + size] for first in range(0, len(run), size)]
    draw.shuffle(batches)
    return batches


def train(
    model: Any,
    batches: list[list[Encoded]],
    collate: Collator,
    lr: float,
    context: Callable[[], Any],
    after_step: Callable[[History], None],
) -> History:
    """Train what requires a gradient on `batches`, one step each.

    Args:
        model: a sequence classifier whose base is frozen.
        batches: those of all epochs, in order.
        collate: makes model inputs of a batch.
        lr: the highest learning rate.
        context: makes the context of each forward (autocast).
        after_step: called with the history after every step; its time does not count.
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, len(batches)))
    # Without it small gradients vanish in fp16; with every other dtype it does nothing.
    scaler = torch.amp.GradScaler(collate.device.type, enabled=model.dtype == torch.float16)
    # The optimizer's first call imports much of torch: not at the cost of the first step's time.
    optimizer.zero_grad()
    history = History()
    model.train()
    for batch in batches:
        started = time.perf_counter()
        with context():
            loss = model(**collate(batch)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
        history.losses.append(loss.item())
        if not math.isfinite(history.losses[-1]):
            raise QuickstartError(f"the loss is {history.losses[-1]} at step {len(history.losses)}: lower --lr")
        history.tokens += sum(len(row.ids) for row in batch)
        history.seconds += time.perf_counter() - started
        after_step(history)
    return history


def logits(model: Any, rows: list[Encoded], collate: Collator, context: Callable[[], Any]) -> Tensor:
    """Outputs (rows, labels) in fp32 on the CPU, in the order of `rows`, with dropout off."""
    import torch

    order = sorted(range(len(rows)), key=lambda position: len(rows[position].ids))
    found = torch.empty(len(rows), model.config.num_labels)
    was_training = model.training
    model.eval()
    with torch.no_grad(), context():
        for places in _parts(order, EVALUATION_BATCH):
            batch = collate([rows[place] for place in places])
            del batch["labels"]
            found[places] = model(**batch).logits.float().cpu()
    model.train(was_training)
    return found


def accuracy(outputs: Tensor, rows: list[Encoded]) -> float:
    """The share of rows whose highest output is that of their label."""
    right = sum(int(guess) == row.label for guess, row in zip(outputs.argmax(-1), rows, strict=True))
    return right / len(rows)


def _lr_share(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _parts(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
