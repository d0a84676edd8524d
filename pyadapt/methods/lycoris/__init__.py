"""Methods that LyCORIS has brought: LoHa and LoKr, whose update is a product of another kind than LoRA's."""

from __future__ import annotations

from ...discovery import import_submodules

import_submodules(__name__, __path__)
