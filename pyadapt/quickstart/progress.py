"""The progress bar of training: loss and tokens a second beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

from .training import History

# The loss shown is a mean over so many newest steps, for one step's jumps about.
SHOWN_STEPS = 10


@contextmanager
def progress_bar(steps: int) -> Iterator[Callable[[History], None]]:
    """A bar of `steps`; call what it yields after every step."""
    from tqdm import tqdm

    with tqdm(total=steps, desc="training", unit="step", dynamic_ncols=True) as bar:

        def advance(history: History) -> None:
            loss = fmean(history.losses[-SHOWN_STEPS:])
            bar.set_postfix_str(f"loss {loss:.3f}, {history.tokens_per_second:,.0f} tokens/s", refresh=False)
            bar.update()

        yield advance
