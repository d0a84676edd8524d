"""Step times that can be compared: the same batch, taken in turns, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WARMUP_ROUNDS = 1


@dataclass(frozen=True)
class Candidate:
    """A model to time, and the context (adapters off, say) that each of its steps runs in."""

    model: Any
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def step_times(
    candidates: dict[str, Candidate],
    batch: dict[str, Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
    rounds: int,
) -> dict[str, float]:
    """Median seconds of a forward and backward of each candidate.

    The gradient goes down to the embeddings in all of them, adapters or none: so the frozen model pays for
    its whole backward too, and the difference is what adapters cost. They take turns: the pace drifts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(WARMUP_ROUNDS + rounds):
        for name, candidate in candidates.items():
            taken = _step(candidate, batch, autocast)
            if turn >= WARMUP_ROUNDS:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _step(candidate: Candidate, batch: dict[str, Tensor], autocast: Callable[[], AbstractContextManager[Any]]) -> float:
    candidate.model.train()
    with candidate.context(), _gradient_to_embeddings(candidate.model):
        _wait_for(batch)
        started = time.perf_counter()
        with autocast():
            loss = candidate.model(**batch).loss
        loss.backward()
        _wait_for(batch)
        taken = time.perf_counter() - started
    candidate.model.zero_grad()
    return taken


@contextmanager
def _gradient_to_embeddings(model: Any) -> Iterator[None]:
    def require(module: Any, inputs: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    hook = model.get_input_embeddings().register_forward_hook(require)
    try:
        yield
    finally:
        hook.remove()


def _wait_for(batch: dict[str, Tensor]) -> None:
    import torch

    if next(iter(batch.values())).is_cuda:
        torch.cuda.synchronize()
