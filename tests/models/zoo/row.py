"""What a row of the matrix of models is: how its model is made, called and judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROWS, TOKENS, VOCABULARY, LABELS = 2, 5, 67, 3

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One model for one task.

    Attributes:
        section: the table of docs/models.md that the row is in: a task type, or what users call the task.
        name: what the row is called there.
        model_class: the name of the model's class.
        kind: "decoder", "encoder", "encoder-decoder", "speech" (an encoder-decoder that is given no text), "vision",
            "diffusion" or "plain".
        make: builds the model, with random weights.
        draw: inputs and labels from a generator; a model without a loss of its own is given a `target`.
        task: the task type of its adapters.
        generates: whether the model has `generate`.
        options: what a configuration says about this model.
        layer_options: what one of a method that adapts layers says besides.
        missing: whether transformers has no such class, so that there is no such model.
    """

    section: str
    name: str
    model_class: str
    kind: str
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    task: str | None = None
    generates: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    layer_options: dict[str, Any] = field(default_factory=dict)
    missing: bool = False

    def build(self) -> nn.Module:
        """The model in evaluation mode; the same weights at each call."""
        torch.manual_seed(0)
        model = self.make()
        assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Classes start weights small, biases at zero and norms at one: faults in them would not show.
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:
                    parameter.copy_(0.2 * noise)
                else:
                    parameter.copy_(0.05 * noise + (not name.endswith("bias")))
        return model.eval()

    def batch(self, seed: int = 0) -> Batch:
        """Inputs with labels, or with a target."""
        return self.draw(torch.Generator().manual_seed(seed))

    def call(self, model: nn.Module, batch: Batch, **more: Any) -> Any:
        """What the model gives for the batch, with its loss."""
        return model(**{key: value for key, value in batch.items() if key != "target"}, **more)

    def inputs(self, batch: Batch) -> Batch:
        """The batch as a model is asked for its output; what an encoder-decoder's labels are made into is an input."""
        asked = () if self.section == "SEQ_2_SEQ_LM" else ("labels", "start_positions", "end_positions")
        return {key: value for key, value in batch.items() if key not in asked}

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The model's own loss, else the mean squared distance from the target."""
        if "target" not in batch:
            return outputs.loss
        return (self.output(outputs) - batch["target"]).square().mean()

    def output(self, outputs: Any) -> Tensor:
        """The tensor that the model's output is compared by."""
        if isinstance(outputs, Tensor):
            return outputs
        if hasattr(outputs, "start_logits"):
            return torch.stack([outputs.start_logits, outputs.end_logits])
        name = next(name for name in ("logits", "last_hidden_state", "sample") if hasattr(outputs, name))
        found = getattr(outputs, name)
        pooled = getattr(outputs, "pooler_output", None)
        return found if pooled is None else torch.cat([found, pooled[:, None]], dim=1)

    def prompt(self, batch: Batch) -> Batch:
        """The batch as `generate` takes it."""
        return {key: value for key, value in batch.items() if key != "labels"}
