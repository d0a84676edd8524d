"""Calling a wrapped model with an adapter for each row of the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from . import mixing
from .state import WithAdapters


class Calls(WithAdapters):
    """The call of the model; its `forward` stays its own, with its own signature."""

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            args: as its own forward.
            adapter_names: the adapter for each row of the batch, `"__base__"` for none; by default the active ones
                serve all rows.
            kwargs: as its own forward.
        """
        if adapter_names is None:
            return super().__call__(*args, **kwargs)
        with self.mixed(adapter_names, args, kwargs):
            return super().__call__(*args, **kwargs)

    def mixed(
        self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Inside the block, row i of each batch is answered with the adapter `names[i]`, if args and names fit."""
        self.check_names([name for name in dict.fromkeys(names) if name != mixing.BASE_MODEL], allow_none=True)
        self.check_not_merged("choose adapters by row")
        mixing.check_batch(names, args, kwargs)
        return mixing.mixed(self, names)
