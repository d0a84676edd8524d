"""The built-in data: no leak from training to held-out texts, balanced labels, the same for the same seed."""

from collections import Counter

import pytest

from pyadapt.quickstart.docstrings import PACKAGES, docstrings, split_docstrings
from pyadapt.quickstart.errors import QuickstartError
from pyadapt.quickstart.examples import Example, Split, hold_out, normalised, without_duplicates


@pytest.fixture(scope="module")
def splits() -> dict[int, Split]:
    return {seed: split_docstrings(seed) for seed in (0, 7)}


@pytest.fixture(params=[0, 7])
def split(splits: dict[int, Split], request: pytest.FixtureRequest) -> Split:
    return splits[request.param]


def test_no_text_is_in_both_halves(split: Split) -> None:
    train, heldout = ({normalised(example.text) for example in half} for half in (split.train, split.heldout))
    assert len(train) == len(split.train)
    assert len(heldout) == len(split.heldout)
    assert not train & heldout


def test_no_module_is_in_both_halves(split: Split) -> None:
    assert not {example.group for example in split.train} & {example.group for example in split.heldout}


def test_labels_are_many_and_balanced(split: Split) -> None:
    for half, fewest in ((split.train, 50), (split.heldout, 10)):
        counts = Counter(example.label for example in half)
        assert set(counts) == set(split.labels)
        assert len(counts) >= 8
        assert len(set(counts.values())) == 1
        assert min(counts.values()) >= fewest


def test_no_text_names_a_label(split: Split) -> None:
    assert not [
        example for example in split.train + split.heldout if any(name in example.text.lower() for name in PACKAGES)
    ]


def test_the_seed_decides(splits: dict[int, Split]) -> None:
    assert split_docstrings(seed=0) == splits[0]
    assert splits[0] != splits[7]


def test_missing_sources_are_one_clear_error(tmp_path) -> None:
    with pytest.raises(QuickstartError, match=r"docstrings of 0 standard packages .* pass --data"):
        split_docstrings(seed=0, stdlib=tmp_path)


def test_docstrings_are_read_without_label_names_and_layout() -> None:
    source = b'''
def send():
    """Send an HTTP request, with a body
    that asyncio has prepared beforehand.
    """
class Short:
    """Too short."""
'''
    assert list(docstrings(source)) == ["Send an request, with a body that has prepared beforehand."]


def test_a_text_under_two_labels_is_dropped_and_a_repeated_one_kept_once() -> None:
    kept, repeated = Example("kept text", "a", "m1"), Example("Kept  Text", "a", "m2")
    torn = [Example("torn text", "a", "m1"), Example("torn text", "b", "m3")]
    assert without_duplicates([kept, repeated, *torn]) == [kept]


@pytest.mark.parametrize(("groups", "expected"), [(1, 0), (2, 1), (5, 1), (10, 2)])
def test_hold_out_takes_about_a_share_and_leaves_some(groups: int, expected: int) -> None:
    names = [f"group {number}" for number in range(groups)]
    held = hold_out(names, 0.2, seed=0)
    assert len(held) == expected
    assert held == hold_out(reversed(names), 0.2, seed=0)
