"""The matrix of models: every model and task of the product, as tiny random models of the real classes."""

from __future__ import annotations

from .others import OTHERS
from .row import Batch, Row
from .text import TEXT

MODELS: list[Row] = [*TEXT, *OTHERS]

__all__ = ["MODELS", "Batch", "Row"]
