"""The prompt of one attention, and its gate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...anatomy import AdaptedAttention, AttentionCall, AttentionUnit, Core
from ...layer import AdaptedLayer
from ...remembering import Remembered


class AdaptionPromptUnit(AttentionUnit):
    """A second attention, of the text's queries over a prompt, added through a gate that starts at zero.

        attention(Q, K, V) + gate softmax(Q K_p' scaling) V_p,    K_p, V_p = what the module makes of the prompt

    The softmax is at least fp32. Keys of the prompt bear no positions. Source: Zhang et al. 2023 (LLaMA-Adapter).

    Attributes:
        prompt: (1, adapter_len, d).
        gate: (1,).
    """

    file_keys: ClassVar[dict[str, str]] = {"prompt": "adaption_prompt", "gate": "adaption_gate"}
    prompt: nn.Parameter
    gate: nn.Parameter

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.remembered = Remembered()

    @classmethod
    def shapes(cls, config: Any, path: str, base: Any, layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`."""
        return {"prompt": (1, config.adapter_len, base.width(layer)), "gate": (1,)}

    def initialize(self, config: Any, path: str, base: Any, layer: Any) -> None:
        """A prompt from N(0, 1), and a gate of zero: at first the model is the base."""
        nn.init.normal_(self.prompt)
        nn.init.zeros_(self.gate)

    def forward(self, owner: AdaptedAttention, core: Core, call: AttentionCall) -> tuple[Tensor, Any]:  # type: ignore[override]
        """See `AttentionUnit.forward`."""
        key, value = self._keys_and_values(owner)
        output, weights = core(call)
        term = self._attention(call, key, value)
        if owner.base.adds_to_output:
            owner.add_to_output(term.flatten(2))
            return output, weights
        return output + term.to(output.dtype), weights

    def _keys_and_values(self, owner: AdaptedAttention) -> tuple[Tensor, Tensor]:
        """What the module makes of the prompt; see `AdaptedAttention.keys_and_values`."""
        if any(isinstance(inner, AdaptedLayer) for inner in owner.children()):
            # Adapters of the projections may be switched or scaled from one call to the next.
            return owner.keys_and_values(self.prompt)
        return self.remembered.get(owner.parameters(), lambda: owner.keys_and_values(self.prompt))

    def _attention(self, call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
        """The gated attention over the prompt, (B, L, H, D)."""
        query, scaling = call.query, call.options.get("scaling")
        groups = query.shape[1] // key.shape[1]
        key, value = (x.to(query.dtype).repeat_interleave(groups, dim=1) for x in (key, value))
        scores = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        at_least = torch.promote_types(query.dtype, torch.float32)
        weights = self.gate * torch.softmax(scores, dim=-1, dtype=at_least).to(query.dtype)
        return torch.matmul(weights.to(value.dtype), value).transpose(1, 2)

    def extra_repr(self) -> str:
        """The length, for `print(model)`."""
        return f"length={self.prompt.shape[1]}"
