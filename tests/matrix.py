"""Every method on every model and task: what holds of each pair.

A method is one line of `matrix_table.py`, which also says what cannot be; a model is one of `models.zoo`.
`matrix_page.py` runs every cell and writes docs/models.md; `test_matrix.py` runs them and compares with the page.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix_table import METHODS, PEFT_FAILS, REFUSED, Method, known
from models import assert_near, snapshot
from models.zoo import MODELS, Batch, Row
from torch import Tensor

import pyadapt
from pyadapt.methods import METHODS as REGISTERED

# What a letter in a cell of the page means; `_Life.run` gives it once the check was passed.
LETTERS = {
    "T": "trains: the loss falls over three steps of Adam, and every weight of the adapter moves",
    "F": "files: saved and loaded into a fresh base model, the adapter gives the same outputs bit for bit",
    "P": "PEFT reads the files, and its model gives the same outputs",
    "G": "generates, where the model does: the same tokens before saving and after loading",
    "M": "merges, where the method adapts layers: the plain model, of its own class again, gives the same outputs",
}


@dataclass(frozen=True)
class Result:
    """What a cell of the page says: the checks that were passed, as letters, and a sentence about what is not there."""

    letters: str
    note: str = ""


Key = tuple[str, str, str]


def key(row: Row, method: Method) -> Key:
    """Where the cell is: table, row and column."""
    return (row.section, row.name, method.name)


CELLS: dict[Key, tuple[Row, Method]] = {key(row, method): (row, method) for row in MODELS for method in METHODS}


def run(row: Row, method: Method, folder: Path) -> Result:
    """Run the checks of one cell.

    Args:
        row: the model.
        method: the method.
        folder: an empty one to save into.

    Raises:
        AssertionError: a check failed, or what was said not to be possible is.
    """
    if row.missing:
        return _missing(row)
    reason = known(REFUSED, row, method)
    return _refused(row, method, reason) if reason else _Life(row, method, folder).run()


def _missing(row: Row) -> Result:
    import transformers

    assert not hasattr(transformers, row.model_class), f"transformers has {row.model_class} now: fill the row"
    return Result("", f"transformers has no class {row.model_class}.")


def _refused(row: Row, method: Method, reason: str) -> Result:
    model = row.build()
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared whole)
        pyadapt.wrap(model, _config(row, method))
    said = re.escape(reason).replace(r"\{model\}", type(model).__name__).replace(r"\{part\}", r"\w+")
    assert re.fullmatch(said, str(raised.value)), str(raised.value)
    assert snapshot(model) == before
    return Result("", f"`wrap` refuses: {reason.format(model='model', part='body')}.")


def _config(row: Row, method: Method) -> dict[str, Any]:
    said = {"task_type": row.task, **row.options, **(row.layer_options if method.on_layers else {})}
    fields = REGISTERED[method.options["peft_type"]].config_class.__dataclass_fields__
    return {**method.options, **{option: value for option, value in said.items() if option in fields}}


class _Life:
    """One adapter from wrapping to merging."""

    def __init__(self, row: Row, method: Method, folder: Path) -> None:
        self.row, self.method, self.folder = row, method, folder
        self.batch: Batch = row.batch()
        model = row.build()
        self.untouched = self.plain_output(model)
        self.plain_class = type(model)
        assert self.plain_class.__name__ == row.model_class
        self.model: Any = pyadapt.wrap(model, _config(row, method))

    def run(self) -> Result:
        self.train()
        adapted = self.output(self.model)
        assert not _near(self.untouched, adapted)
        self.model.save_pretrained(self.folder)
        loaded: Any = pyadapt.load(self.row.build(), self.folder)
        assert torch.equal(self.output(loaded), adapted)
        letters = "TF"
        note = known(PEFT_FAILS, self.row, self.method)
        if note:
            assert not self.peft_agrees(adapted), f"peft agrees now: take it from PEFT_FAILS ({note})"
        else:
            assert_near(self.peft_output(adapted), adapted, "model")
            letters += "P"
        if self.row.generates:
            assert torch.equal(self.generated(loaded), self.generated(self.model))
            letters += "G"
        if self.method.on_layers:
            merged = loaded.merge_and_unload()
            assert type(merged) is self.plain_class
            assert merged.state_dict().keys() == self.row.build().state_dict().keys()
            assert_near(self.plain_output(merged), adapted, "merged")
            letters += "M"
        return Result(letters, note)

    def train(self) -> None:
        """Three steps over one batch."""
        model = self.model.train()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        before = copy.deepcopy(trained)
        optimizer = torch.optim.Adam(trained.values(), lr=3e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(self.loss())
            losses[-1].backward()
            optimizer.step()
        losses.append(self.loss())
        assert losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"
        still = [name for name, parameter in trained.items() if torch.equal(parameter, before[name])]
        assert not still, f"three steps left {', '.join(still)} alone"
        model.eval()

    def loss(self) -> Tensor:
        outputs = self.row.call(self.model, self.batch, **self.method.extra)
        return self.row.loss(outputs, self.batch)

    def output(self, model: Any) -> Tensor:
        with torch.no_grad():
            return self.row.output(self.row.call(model, self.row.inputs(self.batch), **self.method.extra))

    def plain_output(self, model: Any) -> Tensor:
        with torch.no_grad():
            return self.row.output(self.row.call(model, self.row.inputs(self.batch)))

    def generated(self, model: Any) -> Tensor:
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        return model.generate(**self.row.prompt(self.batch), **self.method.extra, **options)

    def peft_output(self, ours: Tensor) -> Tensor:
        """What peft's model makes of the batch with the saved adapter."""
        import peft

        # peft's AdaLoRA fails where there are labels and it is not trainable, a prompt of peft where it is.
        trainable = self.method.on_layers
        with warnings.catch_warnings():
            # What peft remarks is no failure: its LLaMA-Adapter has no option `modules_to_save`, and reads the rest.
            warnings.simplefilter("ignore")
            twin = peft.PeftModel.from_pretrained(self.row.build(), str(self.folder), is_trainable=trainable)
            found = self.output(twin.eval())
        # peft leaves the positions of a prompt in, in front of those of the text.
        return found[tuple(slice(-size, None) for size in ours.shape)] if found.dim() == ours.dim() else found

    def peft_agrees(self, ours: Tensor) -> bool:
        try:
            return _near(self.peft_output(ours), ours)
        except Exception:
            return False


def _near(value: Tensor, exact: Tensor) -> bool:
    try:
        assert_near(value, exact, "model")
    except AssertionError:
        return False
    return True
