"""Options: defaults in one place, and each bad one refused in one line before anything is written."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pyadapt.quickstart import Options, QuickstartError, add_arguments, run
from pyadapt.quickstart.options import SUMMARY_FILE, check
from pyadapt.quickstart.pretrained import locate


def parse(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return Options.from_arguments(parser.parse_args(arguments))


def test_the_parser_and_the_dataclass_have_the_same_defaults() -> None:
    assert parse() == Options()


def test_arguments_reach_their_fields() -> None:
    options = parse("--batch-size", "4", "--data", "x.jsonl", "--base", "bf16", "--lr", "2e-4")
    assert options == Options(batch_size=4, data=Path("x.jsonl"), base="bf16", lr=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "--rank is 0, must be at least 1"),
        ({"epochs": -1}, "--epochs is -1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"max_length": 3}, "--max-length is 3"),
        ({"limit": 1}, "--limit is 1"),
        ({"lr": 0.0}, "--lr is 0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"seed": -1}, "--seed is -1"),
        ({"base": "int3"}, "--base is 'int3', must be one of int8"),
        ({"device": "tpu"}, "--device is 'tpu'"),
        ({"rank": 0, "epochs": 0}, "--rank is 0.*; --epochs is 0"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(QuickstartError, match=message):
        check(replace(Options(out=tmp_path / "out"), **change))


def test_out_may_be_new_empty_or_an_earlier_run(tmp_path: Path) -> None:
    check(Options(out=tmp_path / "new" / "deep"))
    check(Options(out=tmp_path))
    (tmp_path / SUMMARY_FILE).touch()
    check(Options(out=tmp_path))


def test_out_may_not_be_a_file_or_hold_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(QuickstartError, match="not empty and holds no earlier quick start"):
        check(Options(out=tmp_path))
    for out in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "below"):
        with pytest.raises(QuickstartError, match=r"thesis.tex is a file, need a folder"):
            check(Options(out=out))


@pytest.mark.parametrize("model", ["./none", "/none/such", "~/none-such", "a/b/c", ""])
def test_a_model_folder_that_does_not_exist(model: str) -> None:
    with pytest.raises(QuickstartError, match="is no folder"):
        locate(model)


def test_model_folders_and_hub_names(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match=r"has no config\.json"):
        locate(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert locate(str(tmp_path)) == str(tmp_path)
    assert locate("owner/name") == "owner/name"


@pytest.mark.parametrize("bad", [{"rank": 0}, {"model": "./none"}, {"method": "lore"}, {"data": Path("none.jsonl")}])
def test_run_prints_one_line_and_writes_nothing(tmp_path: Path, capsys, bad: dict[str, object]) -> None:
    out = tmp_path / "out"
    assert run(replace(Options(out=out), **bad)) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyadapt quickstart: error: ")
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_package_is_light_to_import() -> None:
    code = (
        "import sys, pyadapt.quickstart;"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'tqdm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
