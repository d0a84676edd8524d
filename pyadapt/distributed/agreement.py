"""Ranks that come to the same place, and fail together: one error on each of them, and none that waits for ever.

They meet in the key-value store of the process group, not in a collective: a collective among ranks of which one has
failed, or is somewhere else, hangs, and cannot say which rank it waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

# Seconds that a rank waits for the others; PYADAPT_RANK_TIMEOUT says otherwise.
TIMEOUT = 300.0

# How often the ranks have met for each subject: the same on all of them, and so part of a meeting's key.
_meetings: Counter[str] = Counter()


class RankError(RuntimeError):
    """Ranks do not agree, or one of them has failed or is missing; raised on every rank that is there."""


def is_distributed() -> bool:
    """Whether this process is one of several that form a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_one_script() -> bool:
    """Whether a launcher started the ranks as one script, so that all of them come to each of its lines.

    PYADAPT_CHECK_RANKS=0 says that they do not.
    """
    asked = os.environ.get("PYADAPT_CHECK_RANKS", "1") != "0"
    return asked and is_distributed() and os.environ.get("WORLD_SIZE") == str(dist.get_world_size())


def rank() -> int:
    """The number of this process in the process group; 0 where there is none."""
    return dist.get_rank() if is_distributed() else 0


def meet(subject: str, value: Any) -> list[Any]:
    """What each rank came with, in the order of ranks.

    Args:
        subject: what they meet for, in words: "wrapping the model".
        value: anything that JSON can hold.

    Raises:
        RankError: a rank did not come in time; the message names it.
    """
    if not is_distributed():
        return [value]
    store = dist.distributed_c10d._get_default_store()
    _meetings[subject] += 1
    prefix = f"pyadapt/{subject}/{_meetings[subject]}"
    everyone = range(dist.get_world_size())
    keys = [f"{prefix}/{other}" for other in everyone]
    read = [f"{prefix}/{other}/read" for other in everyone]
    try:
        store.set(keys[rank()], json.dumps(value))
        _await(store, keys, subject)
        values = [json.loads(store.get(key)) for key in keys]
        store.set(read[rank()], "")
        if rank() == 0:
            # The store most often lives in this process, which may end now: not before all have read.
            _await(store, read, subject)
    except dist.DistNetworkError as error:
        raise RankError(f"{subject}: the rank that keeps the process group's store (0) is gone: {error}") from None
    return values


def _await(store: Any, keys: list[str], subject: str) -> None:
    """Wait until the store has a key for each rank.

    It is asked again and again: a wait of the store's own that runs out of time may leave its connection unusable.
    """
    deadline = time.monotonic() + float(os.environ.get("PYADAPT_RANK_TIMEOUT", TIMEOUT))
    pause = 0.001
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
            raise RankError(
                f"{subject}: rank {', '.join(missing)} did not come here, where every rank has to; look at its "
                "output, or for a branch of the script that it alone takes (`if is_main_process`)"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def agree(subject: str, value: dict[str, Any]) -> None:
    """Refuse to go on where ranks come with different values.

    Args:
        subject: see `meet`.
        value: what is to be the same on every rank, by what it is called in the error.

    Raises:
        RankError: the ranks differ; the message says in what, and which.
    """
    values = meet(subject, value)
    for key in value:
        different = [str(other) for other, theirs in enumerate(values) if theirs.get(key) != values[0].get(key)]
        if different:
            first = int(different[0])
            raise RankError(
                f"{subject}: rank {', '.join(different)} and rank 0 differ in {key}: {values[first].get(key)} and "
                f"{values[0].get(key)}; every rank has to do the same"
            )


@contextlib.contextmanager
def together(subject: str, among_ranks: bool = True) -> Iterator[None]:
    """Run a block that fails on every rank if it fails on one; collectives belong behind it, not inside.

    Args:
        subject: see `meet`.
        among_ranks: False where the other ranks do not come here, and the block is this one's own.

    Raises:
        RankError: the block failed on another rank; the message says which, and why.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if among_ranks and is_distributed():
        try:
            failures = meet(subject, None if failure is None else f"{type(failure).__name__}: {failure}")
        except RankError as missing:
            raise (failure or missing) from None
        others = [f"rank {other}: {what}" for other, what in enumerate(failures) if what is not None]
        if failure is None and others:
            raise RankError(f"{subject} failed on " + "; ".join(others))
    if failure is not None:
        raise failure
