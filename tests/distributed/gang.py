"""Running a function on several processes that form a gloo group, as an engine's ranks.

The processes are forked from a server that has imported the heavy packages once, so that a gang starts in a second.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.forkserver
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

# Before the server is started, which inherits them.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["gang_imports"])


def _start_server() -> None:
    """Start the server, which finds what it imports by the environment alone, and passes over what it does not find."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class GangError(AssertionError):
    """A rank failed or did not end; the message has what each rank said."""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 180, group: bool = True) -> list[Any]:
    """Call `function(*args)` on each rank; its results in the order of ranks.

    Args:
        ranks: how many processes.
        function: a module's own function, found again by its name.
        args: what it is given; pickled, as is the result.
        timeout: seconds after which all are killed.
        group: whether the process group is made first, and ended last.

    Raises:
        GangError: a rank raised or died, or the time is up.
    """
    _start_server()
    answers: Any = _CONTEXT.Queue()
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        process = _CONTEXT.Process(target=_rank, args=(rank, own, function, args, group, answers), daemon=True)
        process.start()
        processes.append(process)
    try:
        return _collect(processes, answers, timeout)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _collect(processes: list[Any], answers: Any, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    grace: float | None = None
    while len(results) + len(failures) < len(processes):
        now = time.monotonic()
        if now > deadline or (grace is not None and now > grace):
            break
        try:
            rank, succeeded, value = answers.get(timeout=0.2)
        except queue.Empty:
            for rank, process in enumerate(processes):
                dead = process.exitcode not in (None, 0)
                if dead and rank not in results and rank not in failures:
                    failures[rank] = f"died with exit code {process.exitcode}"
                    grace = grace or now + 5
            continue
        (results if succeeded else failures)[rank] = value
        if not succeeded:
            # The others most often hang in a collective by now; one that fails too has a moment to say so.
            grace = grace or now + 5
    if len(results) == len(processes):
        return [results[rank] for rank in range(len(processes))]
    silent = [rank for rank in range(len(processes)) if rank not in results and rank not in failures]
    lines = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
    lines += [f"rank {rank}: did not end in time" for rank in silent]
    raise GangError("\n".join(lines))


def _rank(
    rank: int, environment: dict[str, str], function: Callable[..., Any], args: Any, group: bool, answers: Any
) -> None:
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if group:
                dist.init_process_group("gloo")
            result = function(*args)
        answers.put((rank, True, result))
    except BaseException:
        answers.put((rank, False, traceback.format_exc() + said.getvalue()[-2000:]))
    answers.close()
    answers.join_thread()
    sys.stdout.flush()
    # Not through the exit handlers: an engine's threads may wait for ranks that are gone.
    os._exit(0)
