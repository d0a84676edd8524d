"""Figures and states of a wrapped model."""

from __future__ import annotations

from .. import attach
from ..biases import is_bias_copy
from ..layer import saved_modules
from ..planning import count_base_parameters, count_values
from . import status
from .state import WithAdapters


class Reports(WithAdapters):
    """Counting parameters, and the state of layers."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained values, all values); each value of the base counts once, also where a copy of it is trained."""
        units = {id(p): p for name in self.peft_config for p in attach.adapter_parameters(self, name)}
        copies = {id(p) for _, module in saved_modules(self) for p in module.copies.parameters()}
        copies |= {id(p) for name, p in self.named_parameters() if is_bias_copy(name)}
        trained = sum(count_values(p) for p in self.parameters() if p.requires_grad)
        added = sum(count_values(p) for key, p in units.items() if key not in copies)
        return trained, count_base_parameters(self) + added

    def print_trainable_parameters(self) -> None:
        """Print the trained and all parameters, and their ratio in percent."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained} || all params: {total} || trainable%: {100 * trained / total}")

    def get_layer_status(self) -> list[status.LayerStatus]:
        """The state of each layer that carries an adapter."""
        return status.layer_status(self)

    def get_model_status(self) -> status.ModelStatus:
        """The state of all adapters together; what differs between layers is "irregular"."""
        return status.model_status(self)
