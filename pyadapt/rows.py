"""Which adapter serves which row of a batch, as one layer sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which of a layer's units serves each row of the batch.

    Attributes:
        units: the units that some row asks for.
        of_row: index into `units` for each row; -1 where the layer has no unit of that name, or the base was asked for.
    """

    units: tuple[Any, ...]
    of_row: tuple[int, ...]
    _segments: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def segments(self, rows: int) -> Tensor:
        """(n, 2) int64 on the CPU: first row and unit of each run of rows that share a unit.

        Args:
            rows: how many rows the layer sees in all; each row of the batch is as many of them, one after another.
        """
        if rows not in self._segments:
            each = self.rows_each(rows)
            starts = [i for i, unit in enumerate(self.of_row) if i == 0 or unit != self.of_row[i - 1]]
            self._segments[rows] = torch.tensor([[i * each, self.of_row[i]] for i in starts], dtype=torch.int64)
        return self._segments[rows]

    def rows_each(self, rows: int) -> int:
        """How many of `rows` belong to each row of the batch (tokens, beams).

        Raises:
            ValueError: they cannot be told apart.
        """
        if rows % len(self.of_row):
            raise ValueError(
                f"adapter_names has {len(self.of_row)} names, but a layer inside the model sees {rows} rows, which is "
                "no multiple of that: it mixes the rows of the batch, and its adapters cannot be chosen by row"
            )
        return rows // len(self.of_row)

    def split(self, answer: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        """Each unit's rows of `x` answered by themselves, put together in their order.

        Args:
            answer: (unit index or -1, those rows of x) -> their output.
            x: (rows, ...).
        """
        each = self.rows_each(x.shape[0])
        batch = x.unflatten(0, (len(self.of_row), each))
        parts, order = [], []
        for unit in sorted(set(self.of_row)):
            mine = [row for row, of in enumerate(self.of_row) if of == unit]
            part = answer(unit, batch[mine].flatten(0, 1))
            parts.append(part.unflatten(0, (len(mine), each)))
            order += mine
        return torch.cat(parts)[[order.index(row) for row in range(len(order))]].flatten(0, 1)
