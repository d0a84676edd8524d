"""P-tuning: a prompt that a small network makes from embeddings of its tokens (Liu et al. 2021).

    MLP     prompt = W3 relu(W2 relu(W1 e + b1) + b2) + b3
    LSTM    prompt = W2 relu(W1 h + b1) + b2, where h is what a bidirectional LSTM makes of all e

Files hold the finished prompt; trained on from a file, the prompt itself is trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import AdapterConfig
from ...method import AdapterUnit, register
from ...prompt_learning import PROMPT_KEY
from .config import PromptEncoderConfig, PromptEncoderReparameterizationType
from .method import InputPromptMethod, total_tokens
from .unit import InputPrompt

LSTM = PromptEncoderReparameterizationType.LSTM


class _FileKeys(dict[str, str]):
    """What files hold has its key there; what makes it is never in one, and has its own name as a key."""

    def __missing__(self, attribute: str) -> str:
        return f"prompt_encoder.{attribute}"


class PromptEncoderUnit(InputPrompt):
    """Embeddings and the network behind them; or, finished, the prompt.

    Attributes:
        finished: (parts n, d), the prompt.
        embeddings: (parts n, d), what the network reads.
        mlp_i_weight, mlp_i_bias: of its i-th product.
        lstm_*: as in `torch.nn.LSTM`.
    """

    file_keys: ClassVar[dict[str, str]] = _FileKeys(finished=PROMPT_KEY)

    def __init__(self, config: Any, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.layers, self.dropout = config.encoder_num_layers, config.encoder_dropout

    @classmethod
    def prompt_shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See `InputPrompt.prompt_shapes`."""
        rows, d, hidden = total_tokens(config), config.token_dim, config.encoder_hidden_size
        if config.finished:
            return {"finished": (rows, d)}
        if config.encoder_reparameterization_type != LSTM:
            return {"embeddings": (rows, d), **_products(d, hidden, hidden, d)}
        lstm: dict[str, tuple[int, ...]] = {}
        for layer in range(config.encoder_num_layers):
            for end in (f"l{layer}", f"l{layer}_reverse"):
                lstm[f"lstm_weight_ih_{end}"] = (4 * hidden, d if layer == 0 else 2 * hidden)
                lstm[f"lstm_weight_hh_{end}"] = (4 * hidden, hidden)
                lstm[f"lstm_bias_ih_{end}"] = lstm[f"lstm_bias_hh_{end}"] = (4 * hidden,)
        return {"embeddings": (rows, d), **lstm, **_products(2 * hidden, 2 * hidden, d)}

    def initialize(self, config: Any, path: str, base: Any, layer: Any) -> None:
        """N(0, 1) for embeddings; the rest as torch does it."""
        for name, value in self.named_parameters(recurse=False):
            if name in ("embeddings", "finished"):
                nn.init.normal_(value)
            else:
                weight = value if name.startswith("lstm_") else getattr(self, name.replace("_bias", "_weight"))
                bound = 1 / math.sqrt(config.encoder_hidden_size if name.startswith("lstm_") else weight.shape[1])
                nn.init.uniform_(value, -bound, bound)

    def prompt(self, rows: int) -> Tensor:
        """See `InputPrompt.prompt`."""
        return self.made(self.weights())

    def made(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The prompt from parameters of this unit, (parts n, d)."""
        if "finished" in weights:
            return weights["finished"]
        x = weights["embeddings"]
        lstm = [value for name, value in weights.items() if name.startswith("lstm_")]
        if lstm:
            start = x.new_zeros(2 * self.layers, 1, lstm[1].shape[1])
            train = self.training and torch.is_grad_enabled()
            states: Any = torch.lstm(x[None], (start, start), lstm, True, self.layers, self.dropout, train, True, True)
            x = states[0][0]
        products = sum(name.startswith("mlp_") for name in weights) // 2
        for i in range(products):
            x = F.linear(x, weights[f"mlp_{i}_weight"], weights[f"mlp_{i}_bias"])
            x = F.relu(x) if i < products - 1 else x
        return x


def _products(*widths: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights and biases of one product after the other."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        shapes[f"mlp_{i}_weight"], shapes[f"mlp_{i}_bias"] = (outputs, inputs), (outputs,)
    return shapes


@register
class PTuning(InputPromptMethod):
    """P-tuning."""

    peft_type: ClassVar[str] = PromptEncoderConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = PromptEncoderConfig
    units: ClassVar[dict[str, type[AdapterUnit]]] = {"stack": PromptEncoderUnit}

    @classmethod
    def finish(cls, unit: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PromptMethod.finish`."""
        training, unit.training = unit.training, False
        try:
            return {PROMPT_KEY: unit.made(tensors)}
        finally:
            unit.training = training
