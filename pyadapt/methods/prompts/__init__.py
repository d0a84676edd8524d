"""Methods whose prompt is put before the text's embeddings: prompt tuning, P-tuning, multitask prompt tuning."""

from __future__ import annotations

from ...discovery import import_submodules

import_submodules(__name__, __path__)
