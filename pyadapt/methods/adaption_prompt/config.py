"""The configuration of LLaMA-Adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...config import AdapterConfig


@dataclass
class AdaptionPromptConfig(AdapterConfig):
    """Configuration of LLaMA-Adapter; names are those of PEFT.

    Attributes:
        target_modules: what the attentions are called; None asks the model.
        adapter_len: length of each prompt.
        adapter_layers: how many layers, from the top, have one.
        modules_to_save: modules that are trained whole and saved beside the adapter; PEFT has no such option here, and
            a file without any does not have the key.
    """

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("adapter_len", "adapter_layers")

    def to_dict(self) -> dict[str, Any]:
        """See `AdapterConfig.to_dict`."""
        values = super().to_dict()
        if not self.modules_to_save:
            del values["modules_to_save"]
        return values
