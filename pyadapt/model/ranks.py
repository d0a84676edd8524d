"""Starting to train among other ranks: what is checked then, before anything is exchanged."""

from __future__ import annotations

from typing import Any

from ..distributed import agreement, launched
from ..layer import adapted_layers
from ..trained import fingerprint
from .state import WithAdapters


class Ranks(WithAdapters):
    """Checks of a wrapped model that starts to train."""

    def train(self, mode: bool = True) -> Any:
        """As `torch.nn.Module.train`; the first time, ranks make sure that they train the same.

        Raises:
            RuntimeError: accelerate takes each of several processes for the only one.
            RankError: ranks train different adapters, or one is missing.
        """
        if mode and not self.adapter_state.checked:
            launched.check_synchronised()
            if agreement.is_one_script():
                agreement.agree("starting to train", self._trained())
                self.adapter_state.checked = True
        return super().train(mode)

    def _trained(self) -> dict[str, Any]:
        """What is trained, in short; ranks have that in common."""
        return {
            "the active adapters": self.adapter_state.active,
            "the number of adapted layers": sum(1 for _ in adapted_layers(self)),
            "the layers and their shapes": fingerprint(self)[:12],
        }
