"""Choosing a route by measuring: what shares a measurement, when none is made, and what the file survives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pyadapt import native
from pyadapt.ops import autotune
from pyadapt.ops.autotune import Measurements, key_of

BF16, I8 = torch.bfloat16, torch.int8
KEY = key_of("forward", BF16, I8, True, 512, 2048, 1024, 16, False)
OTHER = key_of("backward", BF16, I8, True, 512, 2048, 1024, 16, False)
MACHINE = "a GPU, capability 9.0"


@pytest.fixture(autouse=True)
def _default_environment(monkeypatch):
    for name in ("PYADAPT_AUTOTUNE", "PYADAPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "pyadapt" / "autotune.json"


class Bench:
    """Candidates that take a set time, and a timer that reads it; ``ran`` has the routes in the order of their runs.

    A route's time is a number, numbers for its turns one after the other, or an error to raise.
    """

    def __init__(self, **times):
        self.ran = []
        self.elapsed = 0.0
        self.candidates = {route: self._candidate(route, takes) for route, takes in times.items()}

    def _candidate(self, route, takes):
        def run():
            turn = self.ran.count(route)
            self.ran.append(route)
            if isinstance(takes, Exception):
                raise takes
            self.elapsed = takes[turn] if isinstance(takes, list) else takes
            if isinstance(self.elapsed, Exception):
                raise self.elapsed

        return run

    def timer(self, candidate):
        candidate()
        return self.elapsed

    def best(self, known, key=KEY):
        return known.best(key, self.candidates, self.timer)


def times_in(path):
    return json.loads(path.read_text())["times"]


# --- keys ---


@pytest.mark.parametrize(("M", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (512, 512), (513, 1024), (1000, 1024)])
def test_ragged_token_counts_share_a_key(M, bucket):
    assert f" M{bucket} " in key_of("forward", BF16, I8, True, M, 48, 32, 4, False)


@pytest.mark.parametrize(("r", "bucket"), [(0, 0), (1, 16), (16, 16), (17, 32), (64, 64)])
def test_ranks_share_a_key(r, bucket):
    assert f" r{bucket} " in key_of("forward", BF16, I8, True, 64, 48, 32, r, False)


def test_a_key_tells_apart_all_that_matters():
    assert KEY == "forward bfloat16 int8 rows M512 N2048 K1024 r16 plain"
    usual = ("forward", BF16, I8, True, 512, 2048, 1024, 16, False)
    changed = ("backward", torch.float16, BF16, False, 513, 2049, 1025, 17, True)
    keys = {key_of(*usual[:i], change, *usual[i + 1 :]) for i, change in enumerate(changed)}
    assert len(keys | {KEY}) == len(changed) + 1


# --- choosing ---


def test_the_fastest_is_chosen_and_measured_once(path):
    bench = Bench(fused=30.0, library=20.0)
    known = Measurements(MACHINE, path)
    assert known.remembered(KEY) is None
    assert bench.best(known) == "library"
    runs = len(bench.ran)
    assert bench.best(known) == known.remembered(KEY) == "library"
    assert known.remembered(OTHER) is None
    assert len(bench.ran) == runs
    assert known.table() == [(KEY, "library", {"fused": 30.0, "library": 20.0})]


def test_candidates_take_turns():
    bench = Bench(fused=30.0, library=20.0)
    bench.best(Measurements(MACHINE, None))
    assert bench.ran == ["fused", "library"] * (autotune.WARM_UP + autotune.TURNS)


def test_warm_up_and_outliers_do_not_count():
    turns = [1e6] * autotune.WARM_UP + [10.0] * (autotune.TURNS - 2) + [1e6] * 2
    known = Measurements(MACHINE, None)
    assert Bench(fused=turns, library=20.0).best(known) == "fused"
    assert known.table() == [(KEY, "fused", {"fused": 10.0, "library": 20.0})]
    # Nor do turns that were too fast.
    fast = [1.0] * (autotune.WARM_UP + 1) + [30.0] * (autotune.TURNS - 1)
    assert Bench(fused=fast, library=20.0).best(known, OTHER) == "library"


def test_no_graph_of_a_candidate_is_recorded():
    seen = []
    run = {"fused": lambda: seen.append(torch.is_grad_enabled())}
    with torch.enable_grad():
        Measurements(MACHINE, None).best(KEY, run, lambda candidate: candidate() or 1.0)
        assert torch.is_grad_enabled()
    assert set(seen) == {False}


def test_among_other_candidates():
    known = Measurements(MACHINE, None)
    Bench(fused=10.0, library=20.0, skinny=30.0).best(known)
    assert known.remembered(KEY, ["library", "skinny"]) == "library"
    assert known.remembered(KEY, ["library", "reference"]) is None
    fewer = Bench(library=1.0, skinny=2.0)
    assert fewer.best(known) == "library"
    assert not fewer.ran
    # One that is new is measured beside the others; what else is known stays.
    assert Bench(library=20.0, reference=5.0).best(known) == "reference"
    assert known.table()[0][2] == {"fused": 10.0, "library": 20.0, "skinny": 30.0, "reference": 5.0}


# --- candidates that fail ---


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), torch.cuda.OutOfMemoryError("full")], ids=repr)
@pytest.mark.parametrize("turn", [0, 3])
def test_a_failing_candidate_is_left_out(path, error, turn):
    bench = Bench(fused=[1.0] * turn + [error], library=20.0)
    known = Measurements(MACHINE, path)
    assert bench.best(known) == "library"
    assert bench.ran.count("fused") == turn + 1
    runs = len(bench.ran)
    assert bench.best(known) == "library"
    assert len(bench.ran) == runs
    # Another process may have the memory for it.
    assert not path.exists()
    Bench(fused=1.0, library=2.0).best(known, OTHER)
    assert set(times_in(path)) == {OTHER}
    assert Bench(fused=1.0, library=2.0).best(Measurements(MACHINE, path)) == "fused"


def test_when_all_fail_the_last_error_is_raised():
    known = Measurements(MACHINE, None)
    bench = Bench(fused=RuntimeError("first"), library=[1.0, RuntimeError("second")])
    with pytest.raises(RuntimeError, match="second"):
        bench.best(known)
    assert known.remembered(KEY) is None


def test_errors_of_other_kinds_are_raised():
    with pytest.raises(TypeError, match="wrong"):
        Bench(fused=TypeError("wrong"), library=1.0).best(Measurements(MACHINE, None))


# --- when nothing is measured ---


def tuned():
    """Measurements of KEY alone, library being the fastest."""
    known = Measurements(MACHINE, None)
    assert Bench(fused=3.0, library=2.0).best(known) == "library"
    return known


def check_not_measured(known, remembered):
    bench = Bench(fused=1.0, library=2.0)
    assert bench.best(known) == known.remembered(KEY) == remembered
    assert bench.best(known, OTHER) is None
    assert not bench.ran


def test_switched_off(monkeypatch):
    known = tuned()
    monkeypatch.setenv("PYADAPT_AUTOTUNE", "0")
    check_not_measured(known, None)
    monkeypatch.setenv("PYADAPT_AUTOTUNE", "1")
    assert known.remembered(KEY) == "library"
    assert Bench(fused=1.0, library=2.0).best(known, OTHER) == "fused"


def test_deterministic_algorithms():
    known = tuned()
    torch.use_deterministic_algorithms(True)
    try:
        check_not_measured(known, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert known.remembered(KEY) == "library"


def test_while_a_graph_is_captured(monkeypatch):
    known = tuned()
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_not_measured(known, "library")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert Bench(fused=1.0, library=2.0).best(known, OTHER) == "fused"


def test_while_compiling(monkeypatch):
    known = tuned()
    monkeypatch.setattr(autotune, "is_compiling", lambda: True)
    check_not_measured(known, "library")


@pytest.mark.parametrize("mode", [FakeTensorMode, FunctionalTensorMode])
def test_under_a_mode(mode):
    known = tuned()
    with mode():
        check_not_measured(known, "library")


@pytest.mark.parametrize(
    "trace",
    [
        lambda f: torch.func.vmap(f)(torch.ones(2, 3)),
        lambda f: torch.func.functionalize(f)(torch.ones(3)),
        lambda f: make_fx(f)(torch.ones(3)),
    ],
    ids=["vmap", "functionalize", "make_fx"],
)
def test_under_a_transform(trace):
    known, called = tuned(), []

    def function(x):
        check_not_measured(known, "library")
        called.append(True)
        return x + 1

    trace(function)
    assert called


# --- the file ---


def test_another_process_finds_it(path):
    assert Bench(fused=3.0, library=2.0).best(Measurements(MACHINE, path)) == "library"
    later, bench = Measurements(MACHINE, path), Bench(fused=1.0, library=2.0)
    assert later.remembered(KEY) == bench.best(later) == "library"
    assert not bench.ran
    assert os.listdir(path.parent) == [path.name]


def test_the_file_is_read_once_and_when_needed(path):
    known = Measurements(MACHINE, path)
    Bench(fused=3.0, library=2.0).best(Measurements(MACHINE, path))
    assert known.remembered(KEY) == "library"
    path.unlink()
    assert known.remembered(KEY) == "library"


def test_two_writers_are_merged(path):
    one, two = Measurements(MACHINE, path), Measurements(MACHINE, path)
    assert one.remembered(KEY) is two.remembered(KEY) is None
    Bench(fused=3.0, library=2.0).best(one)
    # The second has not seen what the first wrote, measures it anew, and as the last to write is right in the file.
    Bench(fused=4.0, library=5.0).best(two)
    assert times_in(path) == {KEY: {"fused": 4.0, "library": 5.0}}
    Bench(fused=6.0, library=7.0).best(one, OTHER)
    assert times_in(path) == {KEY: {"fused": 4.0, "library": 5.0}, OTHER: {"fused": 6.0, "library": 7.0}}
    # The first keeps its choice to its end, and its entries come back should the file be lost.
    assert one.remembered(KEY) == "library"
    path.unlink()
    Bench(fused=1.0).best(one, "third")
    assert set(times_in(path)) == {KEY, OTHER, "third"}


WRITE = """
import sys
from pathlib import Path
from pyadapt.ops.autotune import Measurements
path, name, machine = sys.argv[1:]
known = Measurements(machine, Path(path))
for i in range(40):
    known.best(f"{name} {i}", {"fused": lambda: None, "library": lambda: None}, lambda candidate: 1.0)
"""


def test_processes_that_write_at_once_leave_a_whole_file(path):
    command = [sys.executable, "-c", WRITE, os.fspath(path)]
    writers = [subprocess.Popen([*command, name, MACHINE]) for name in ("one", "two")]
    while any(writer.poll() is None for writer in writers):
        Measurements(MACHINE, path).table()  # a warning, which is an error here, if the file is not whole
    assert [writer.returncode for writer in writers] == [0, 0]
    # The last to write has its own entries in the file, and what it found there.
    found = set(times_in(path))
    assert any({f"{name} {i}" for i in range(40)} <= found for name in ("one", "two"))
    assert os.listdir(path.parent) == [path.name]


def _file(header=f"autotune 1, {MACHINE}", **content):
    return json.dumps({"header": header, **content})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"[" * 100_000,
        _file("autotune 0, " + MACHINE, times={KEY: {"fused": 1.0}}).encode(),
        _file("autotune 1, another GPU", times={KEY: {"fused": 1.0}}).encode(),
        _file().encode(),
        _file(times=[1]).encode(),
        _file(times={KEY: 3}).encode(),
        _file(times={KEY: {}}).encode(),
        _file(times={KEY: {"fused": "fast"}}).encode(),
        _file(times={KEY: {"fused": -1.0}}).encode(),
        _file(times={KEY: {"fused": float("nan")}}).encode(),
        _file(times={KEY: {"fused": float("inf")}}).encode(),
    ],
    ids=lambda content: content[:60].decode(errors="replace"),
)
def test_a_bad_file_is_ignored_with_one_warning_and_replaced(path, content):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    known = Measurements(MACHINE, path)
    with pytest.warns(RuntimeWarning, match=r"autotune\.json is ignored") as warned:
        assert known.remembered(KEY) is None
    assert len(warned) == 1
    assert Bench(fused=3.0, library=2.0).best(known) == "library"
    assert times_in(path) == {KEY: {"fused": 3.0, "library": 2.0}}
    assert Measurements(MACHINE, path).remembered(KEY) == "library"


def test_an_unwritable_folder_is_warned_of_once(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    known = Measurements(MACHINE, tmp_path / "cache" / "autotune.json")
    with pytest.warns(RuntimeWarning, match="cannot be written.*set PYADAPT_CACHE") as warned:
        assert Bench(fused=3.0, library=2.0).best(known) == "library"
    assert len(warned) == 1
    assert Bench(fused=1.0, library=2.0).best(known, OTHER) == "fused"
    assert known.remembered(KEY) == "library"


def test_threads_measure_once(path):
    bench = Bench(fused=3.0, library=2.0)
    known = Measurements(MACHINE, path)
    start, chosen = threading.Barrier(6), []

    def slow_timer(candidate):
        time.sleep(0.01)  # meanwhile the others find that there is nothing to remember
        return bench.timer(candidate)

    def choose():
        start.wait()
        chosen.append(known.best(KEY, bench.candidates, slow_timer))

    threads = [threading.Thread(target=choose) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == ["library"] * 6
    assert bench.ran == ["fused", "library"] * (autotune.WARM_UP + autotune.TURNS)


# --- where, and on what machine ---


def test_cache_folder(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert autotune.cache_folder() == Path("home/.cache/pyadapt")
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert autotune.cache_folder() == Path("caches/pyadapt")
    monkeypatch.setenv("PYADAPT_CACHE", "own")
    assert autotune.cache_folder() == Path("own")


def _no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine to change: a GPU, an extension, torch and its CUDA."""
    extension = tmp_path / "_native.so"
    extension.write_bytes(b"a build")
    gpu = SimpleNamespace(name="NVIDIA T4/8Q", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(native, "cuda", lambda: SimpleNamespace(__file__=os.fspath(extension)))
    monkeypatch.setenv("PYADAPT_CACHE", os.fspath(tmp_path / "cache"))
    autotune.measurements.cache_clear()
    yield SimpleNamespace(gpu=gpu, extension=extension)
    autotune.measurements.cache_clear()


def remembered_by_a_new_process():
    autotune.measurements.cache_clear()
    return autotune.measurements(torch.device("cuda", 0)).remembered(KEY)


def test_a_file_for_each_machine(machine, monkeypatch, tmp_path):
    assert Bench(fused=3.0, library=2.0).best(autotune.measurements(torch.device("cuda", 0))) == "library"
    assert remembered_by_a_new_process() == "library"
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("autotune-NVIDIA-T4-8Q-")
    assert json.loads(file.read_text())["header"].startswith("autotune 1, NVIDIA T4/8Q, capability 7.5, build ")
    for owner, name, value in (
        (machine.gpu, "name", "NVIDIA L4"),
        (machine.gpu, "minor", 6),
        (torch, "__version__", "99.0"),
        (torch.version, "cuda", "99.0"),
        (native, "cuda", lambda: None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert remembered_by_a_new_process() is None, name
    assert remembered_by_a_new_process() == "library"
    machine.extension.write_bytes(b"another build")
    assert remembered_by_a_new_process() is None


@pytest.mark.usefixtures("machine")
def test_equal_devices_share_a_file_and_no_lock():
    first, second = (autotune.measurements(torch.device("cuda", index)) for index in (0, 1))
    assert first is autotune.measurements(torch.device("cuda", 0))
    assert first is not second
    Bench(fused=3.0, library=2.0).best(first)
    assert second.remembered(KEY) == "library"


@pytest.mark.usefixtures("machine")
def test_without_a_home_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.delenv("PYADAPT_CACHE")
    monkeypatch.setattr(Path, "home", _no_home)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    known = autotune.measurements(torch.device("cuda", 0))
    assert Bench(fused=3.0, library=2.0).best(known) == known.remembered(KEY) == "library"
    assert set(tmp_path.iterdir()) == before


# --- the timer ---


def test_the_timer_counts_its_calls_alone(monkeypatch):
    log, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = clock[0]

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, stop):
            return stop.at - self.at

    def work():
        log.append("work")
        clock[0] += 0.25  # ms

    def earlier_work_ends():
        log.append("idle")
        clock[0] += 100.0

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=earlier_work_ends))
    assert autotune.cuda_timer(torch.device("cuda", 0), calls=4)(work) == 250.0
    assert log == ["idle", "record", *["work"] * 4, "record", "wait"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA device")
def test_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PYADAPT_CACHE", os.fspath(tmp_path))
    autotune.measurements.cache_clear()
    device = torch.device("cuda", torch.cuda.current_device())
    small, large = (torch.randn(size, size, device=device) for size in (512, 8192))
    known = autotune.measurements(device)
    candidates = {"small": lambda: small @ small, "large": lambda: large @ large}
    assert known.best(KEY, candidates, autotune.cuda_timer(device)) == "small"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert known.best(OTHER, candidates, autotune.cuda_timer(device)) is None
        assert known.best(KEY, candidates, autotune.cuda_timer(device)) == "small"
    autotune.measurements.cache_clear()
