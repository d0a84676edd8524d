"""The user's own data: what is held out, and one clear line for each thing that can be wrong with a file."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pyadapt.quickstart.errors import QuickstartError
from pyadapt.quickstart.jsonl import split_jsonl


def write(path: Path, *rows: object) -> Path:
    file = path / "data.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return file


def rows(count: int, **more: object) -> list[dict[str, object]]:
    return [{"text": f"text {i}", "label": "ab"[i % 2], **more} for i in range(count)]


def test_texts_of_every_label_are_held_out(tmp_path: Path) -> None:
    split = split_jsonl(write(tmp_path, *rows(20)), seed=0)
    assert Counter(example.label for example in split.heldout) == {"a": 2, "b": 2}
    assert len(split.train) == 16
    assert not {e.text for e in split.train} & {e.text for e in split.heldout}


def test_the_order_of_rows_does_not_decide(tmp_path: Path) -> None:
    there = split_jsonl(write(tmp_path, *rows(20)), seed=0)
    back = split_jsonl(write(tmp_path, *reversed(rows(20))), seed=0)
    assert set(there.heldout) == set(back.heldout)
    assert set(there.heldout) != set(split_jsonl(write(tmp_path, *rows(20)), seed=1).heldout)


def test_a_group_stays_whole(tmp_path: Path) -> None:
    grouped = [{**row, "group": number // 4} for number, row in enumerate(rows(40))]
    split = split_jsonl(write(tmp_path, *grouped), seed=0)
    train, heldout = ({example.group for example in half} for half in (split.train, split.heldout))
    assert len(heldout) == 2
    assert not train & heldout


def test_number_labels_and_blank_lines_are_fine(tmp_path: Path) -> None:
    data = [{"text": f"text {i}", "label": i % 3} for i in range(12)]
    assert split_jsonl(write(tmp_path, "", *data, "", ""), seed=0).labels == ["0", "1", "2"]


GOOD = '{"text": "a text", "label": "a"}'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops", r"line 2 is not JSON"),
        ("[1, 2]", r"line 2 is a list, need an object"),
        ('{"label": "a"}', r"line 2 has no 'text'; its keys are \['label'\]"),
        ('{"text": "x"}', r"line 2 has no 'label'"),
        ('{"text": 5, "label": "a"}', r"line 2: 'text' is a int, need str"),
        ('{"text": "x", "label": null}', r"line 2: 'label' is a NoneType, need str or int"),
        ('{"text": "x", "label": true}', r"line 2: 'label' is a bool"),
        ('{"text": "  ", "label": "a"}', r"line 2: the text is empty"),
        ('{"text": "x", "label": ""}', r"line 2: the label is empty"),
        ('{"text": "x", "label": "a", "group": [1]}', r"line 2: 'group' is a list"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, bad: str, message: str) -> None:
    with pytest.raises(QuickstartError, match=message):
        split_jsonl(write(tmp_path, GOOD, bad), seed=0)


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ([], "has no rows"),
        (["", "  "], "has no rows"),
        ([GOOD, '{"text": "other", "label": "a"}'], "has 1 label"),
        ([GOOD, '{"text": "A text", "label": "b"}'], "has 2 label.*0 of them"),
        ([GOOD, '{"text": "other", "label": "b"}'], "too few texts"),
    ],
)
def test_a_file_with_too_little_says_so(tmp_path: Path, whole: list[str], message: str) -> None:
    with pytest.raises(QuickstartError, match=message):
        split_jsonl(write(tmp_path, *whole), seed=0)


def test_a_label_that_is_only_held_out_is_refused(tmp_path: Path) -> None:
    # Each label lies in one group, so that holding out either group leaves its label untaught.
    torn = [{**row, "group": row["label"]} for row in rows(8)]
    with pytest.raises(QuickstartError, match=r"all rows of label '[ab]' are held out"):
        split_jsonl(write(tmp_path, *torn), seed=0)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match="No such file"):
        split_jsonl(tmp_path / "none.jsonl", seed=0)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9", "label": "a"}')
    with pytest.raises(QuickstartError, match="not UTF-8: byte 13 is 0xe9"):
        split_jsonl(tmp_path / "latin.jsonl", seed=0)
