"""Drawing the same first values on every rank, whatever seeds they have.

DDP and ZeRO-3 give all ranks the values of the first. FSDP2 does not, nor FSDP1 without `sync_module_states`: each rank
keeps its own part of what it has drawn, and the adapter would be put together from different ones.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator

import torch

from . import agreement


@contextlib.contextmanager
def drawn_alike() -> Iterator[None]:
    """Inside the block, ranks that a launcher started as one script draw from the first one's generators.

    That state is all that is exchanged, some kilobytes through the store of the process group. After the block a rank's
    generators go on from where they were, so that ranks with seeds of their own still drop and shuffle differently.

    Raises:
        RankError: a rank did not come here.
    """
    if not agreement.is_one_script():
        yield
        return
    own = _states()
    sent = {name: base64.b64encode(state).decode() for name, state in own.items()}
    first = agreement.meet("starting the adapter", sent if agreement.rank() == 0 else None)[0]
    theirs = {name: base64.b64decode(state) for name, state in first.items() if name in own}
    if all(theirs[name] == own[name] for name in theirs):
        yield
        return
    _set_states(theirs)
    try:
        yield
    finally:
        _set_states(own)


def _states() -> dict[str, bytes]:
    """The state of the generators that weights are drawn from: the CPU's and the current GPU's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.numpy().tobytes() for name, state in states.items()}


def _set_states(states: dict[str, bytes]) -> None:
    for name, state in states.items():
        setter = torch.set_rng_state if name == "cpu" else torch.cuda.set_rng_state
        setter(torch.frombuffer(bytearray(state), dtype=torch.uint8))
