"""Every method on every model and task: each cell of docs/models.md is run, and has to say what was found."""

from __future__ import annotations

import pytest
from matrix import CELLS, LETTERS, run
from matrix_page import PAGE, parse, render
from matrix_table import METHODS, PEFT_FAILS, REFUSED, known

from pyadapt.methods import METHODS as REGISTERED

ANEW = "write docs/models.md anew: python tests/matrix_page.py"


@pytest.fixture(scope="module")
def page():
    """What the committed page says of each cell."""
    return parse(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_cell(cell, page, tmp_path):
    row, method = CELLS[cell]
    assert run(row, method, tmp_path) == page.get(cell), ANEW


def test_the_page_is_what_the_run_writes(page):
    """Together with the cells: no row too many, no empty cell, no other words."""
    assert page.keys() == CELLS.keys(), ANEW
    assert render(page) == PAGE.read_text(encoding="utf-8"), ANEW
    for result in page.values():
        assert result.letters or result.note
        assert set(result.letters) <= LETTERS.keys()


def test_no_reason_is_left_over():
    """Each reason is that of some cell that is run: a sentence about nothing would stay untested."""
    for table in (REFUSED, PEFT_FAILS):
        given = {known(table, row, method) for row, method in CELLS.values() if not row.missing}
        assert [entry.reason for entry in table if entry.reason not in given] == []


def test_every_method_is_a_column():
    """A method that registers itself and is not in the matrix would have no row of docs/models.md."""
    assert sorted(method.options["peft_type"] for method in METHODS) == sorted(REGISTERED)
