"""The methods: one file each, holding its configuration, its weights, its mathematics and its names in files."""

from __future__ import annotations

from ..discovery import import_submodules
from ..method import METHODS

import_submodules(__name__, __path__)

__all__ = ["METHODS"]
