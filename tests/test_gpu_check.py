"""scripts/gpu_check.py as far as a machine without a GPU shows it: arguments, running, logs, the summary."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from source_tree import ROOT, script

if not (ROOT / "scripts").is_dir():
    pytest.skip("waits for a source tree: scripts are not installed", allow_module_level=True)

gpu_check = script("gpu_check")
GPU = gpu_check.Gpu("Some GPU", "90", "torch 2.11.0, CUDA 13.0")


@pytest.fixture
def context(tmp_path, monkeypatch):
    """Everything is written to a temporary folder."""
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    (tmp_path / "work").mkdir()
    return gpu_check.Context(GPU, tmp_path / "work", keep_going=False)


def set_part(monkeypatch, name: str, *programs: str) -> None:
    """Let a part be these Python programs."""
    commands = [[sys.executable, "-c", program] for program in programs]
    monkeypatch.setitem(gpu_check.PARTS, name, lambda context: commands)


def test_without_a_gpu(monkeypatch, capsys, context):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("gpu-check needs a CUDA GPU, and there is none: torch ")
    assert len(printed.splitlines()) == 1
    assert gpu_check.main(["tests", "--architecture", "90"]) == 2
    assert "the part build alone" in capsys.readouterr().out


def test_a_machine_without_torch(monkeypatch):
    def failing(*_, **__):
        return subprocess.CompletedProcess([], 1, "", "Traceback\nModuleNotFoundError: No module named 'torch'\n")

    monkeypatch.setattr(gpu_check.subprocess, "run", failing)
    with pytest.raises(gpu_check.NotHere, match="there is none: ModuleNotFoundError: No module named 'torch'"):
        gpu_check.find_gpu()


def test_arguments(capsys):
    assert gpu_check.chosen_parts([]) == ["build", "tests", "conformance", "sanitizer", "kernels", "layers"]
    assert gpu_check.chosen_parts(["benchmarks", "tests"]) == ["tests", "kernels", "layers"]
    assert gpu_check.chosen_parts(["layers", "layers"]) == ["layers"]
    with pytest.raises(SystemExit) as wrong:
        gpu_check.main(["test"])
    assert wrong.value.code == 2
    assert "no part test; there are build, tests," in capsys.readouterr().err


def test_a_part_runs_up_to_its_first_failure(monkeypatch, context):
    set_part(monkeypatch, "tests", "print('=== 3 passed, 1 skipped in 0.5s ===')", "exit(3)", "print('never')")
    result = gpu_check.run_part("tests", context)
    assert (result.status, result.note) == ("FAILED", "exit status 3; 3 passed, 1 skipped")
    assert "never" not in (context.logs / "tests.log").read_text().replace("print('never')", "")


def test_a_part_ends_at_its_limit_with_all_it_started(monkeypatch, context):
    sleeper = "import time; time.sleep(60)"
    started = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{sleeper}']); "
    set_part(monkeypatch, "tests", f"{started}print(p.pid, flush=True); {sleeper}")
    start = time.monotonic()
    result = gpu_check.run_part("tests", context, limit=3.0)
    assert time.monotonic() - start < 30
    assert (result.status, result.note) == ("FAILED", "over its limit of 3 s")
    pid = int((context.logs / "tests.log").read_text().splitlines()[-1])
    for _ in range(50):
        if not _alive(pid):
            break
        time.sleep(0.1)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody waits for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_machine_cannot_do_is_not_a_failure(monkeypatch, context):
    set_part(monkeypatch, "sanitizer", "print('========= Device not supported'); exit(1)")
    result = gpu_check.run_part("sanitizer", context)
    assert result.status == "not run"
    assert "does not support" in result.note

    def missing(context):
        raise gpu_check.NotHere("compute-sanitizer is not installed")

    monkeypatch.setitem(gpu_check.PARTS, "sanitizer", missing)
    assert gpu_check.run_part("sanitizer", context).note == "compute-sanitizer is not installed"


def run_main(monkeypatch, capsys, *arguments: str) -> tuple[int, list[str]]:
    """(exit status, lines) on a machine that has a GPU."""
    monkeypatch.setattr(gpu_check, "find_gpu", lambda: GPU)
    monkeypatch.delenv("OUT", raising=False)
    status = gpu_check.main(list(arguments))
    return status, capsys.readouterr().out.splitlines()


def test_everything_in_order(monkeypatch, capsys, context):
    for part in gpu_check.PARTS:
        set_part(monkeypatch, part, f"print('{part}')")
    status, lines = run_main(monkeypatch, capsys)
    assert status == 0
    assert [line.split()[0] for line in lines[:6]] == list(gpu_check.PARTS)
    assert lines[6] == "gpu-check: Some GPU, sm_90, torch 2.11.0, CUDA 13.0"
    assert [line.split()[:2] for line in lines[8:14]] == [[part, "ok"] for part in gpu_check.PARTS]


def test_it_stops_at_the_first_failure(monkeypatch, capsys, context):
    for part in gpu_check.PARTS:
        set_part(monkeypatch, part, "exit(1)" if part == "tests" else f"print('{part}')")
    status, lines = run_main(monkeypatch, capsys)
    assert status == 1
    assert [line.split()[1] for line in lines[-6:]] == ["ok", "FAILED", "not", "not", "not", "not"]
    status, lines = run_main(monkeypatch, capsys, "--keep-going")
    assert status == 1
    assert [line.split()[1] for line in lines[-6:]] == ["ok", "FAILED", "ok", "ok", "ok", "ok"]


def test_a_build_is_made_where_there_is_none(monkeypatch, capsys, context):
    set_part(monkeypatch, "build", "import os; os.makedirs('site')")
    set_part(monkeypatch, "tests", "print('tests')")
    assert run_main(monkeypatch, capsys, "tests")[1][:2] == ["build ...", "tests ..."]
    assert run_main(monkeypatch, capsys, "tests")[1][0] == "tests ..."
    assert gpu_check.is_built("90")
    assert not gpu_check.is_built("80")
    monkeypatch.setattr(gpu_check, "fingerprint", lambda architecture: "other sources")
    assert run_main(monkeypatch, capsys, "tests")[1][0] == "build ..."


def test_the_summary_has_forty_lines(monkeypatch, capsys, context):
    for part in gpu_check.PARTS:
        lines = f"print('long output\\n' * 100, 'summary: {part}', *(f'{part} {{i}}' for i in range(50)), sep='\\n')"
        set_part(monkeypatch, part, lines)
    _, lines = run_main(monkeypatch, capsys)
    lines = lines[lines.index("gpu-check: Some GPU, sm_90, torch 2.11.0, CUDA 13.0") :]
    assert len(lines) == gpu_check.SUMMARY_LINES
    assert "-- kernels" in lines
    assert lines[-1].endswith("more in the log")
    few = [gpu_check.Result("kernels", "ok", 1.0, "", ["a"]), gpu_check.Result("layers", "ok", 1.0, "", ["b"] * 30)]
    assert gpu_check.summarize(GPU, few).count("b") == 30


def test_rows_are_kept_under_one_header(context):
    fresh, kept = context.logs / "cuda_kernels.csv", gpu_check.RESULTS / "cuda_kernels.csv"
    assert gpu_check.keep_rows(fresh, kept) == "no rows"
    fresh.write_text('date,gpu\n1,"a, b"\n2,c\n')
    assert gpu_check.keep_rows(fresh, kept) == "2 rows"
    assert gpu_check.keep_rows(fresh, kept) == "2 rows"
    assert kept.read_text().splitlines() == ["date,gpu", '1,"a, b"', "2,c", '1,"a, b"', "2,c"]
    fresh.write_text("date,driver\n1,2\n")
    assert "other columns" in gpu_check.keep_rows(fresh, kept)
    assert len(kept.read_text().splitlines()) == 5


def test_commands(context, monkeypatch):
    """Offline, for one architecture, on the build and nothing else."""
    try:
        (build,) = gpu_check.build(context)
    except gpu_check.cuda_toolkit.ToolMissing:
        pytest.skip("waits for nvcc")
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(build)
    assert "--config-settings=cmake.define.PYADAPT_CUDA=on" in build
    assert "--config-settings=cmake.define.PYADAPT_CUDA_ARCHITECTURES=90-real" in build
    assert any(setting.startswith("--config-settings=cmake.define.CMAKE_CUDA_COMPILER=") for setting in build)
    path = context.environment()["PYTHONPATH"].split(os.pathsep)
    assert path == [str(context.site), str(ROOT)]
    for part in ("tests", "conformance"):
        for command in gpu_check.PARTS[part](context)[part == "tests" :]:
            assert "-x" in command
            named = [argument for argument in command if argument.startswith(str(ROOT / "tests"))]
            assert named
            assert all(os.path.exists(argument) for argument in named)
    monkeypatch.setattr(gpu_check.cuda_toolkit, "tool", lambda name: name)
    _, memcheck, racecheck = gpu_check.sanitizer(context)
    sources = "".join((ROOT / "tests" / "cuda" / f"test_{name}.py").read_text() for name in ("lora", "quantize"))
    assert all(f"def {name}" in sources for name in gpu_check.SANITIZED.split(" or "))
    assert "memcheck" in memcheck
    assert "racecheck" in racecheck


def test_another_pyadapt_is_refused(context):
    """The tests never run on a pyadapt that is not the build's."""
    command = gpu_check.which_pyadapt()
    done = subprocess.run(command, capture_output=True, text=True, cwd=context.logs)
    assert done.returncode == 1
    assert "not the one built into" in done.stderr
