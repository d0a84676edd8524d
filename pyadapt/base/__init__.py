"""The kinds of frozen weight, one file each. A kind knows nothing of any method, and a method nothing of any kind."""

from __future__ import annotations

from ..discovery import import_submodules
from .kind import KINDS, BaseWeight, Host, Operands, base_of

import_submodules(__name__, __path__)

__all__ = ["KINDS", "BaseWeight", "Host", "Operands", "base_of"]
