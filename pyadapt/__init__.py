"""pyadapt: parameter-efficient fine-tuning at close to the cost of the frozen model.

    model = pyadapt.wrap(model, pyadapt.LoraConfig(r=16))
    ...train...
    model.save_pretrained("adapter")
    pyadapt.export(model, "merged")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module it lives in. Loaded when first used: importing pyadapt costs what importing torch costs.
_HOMES = {
    "AdapterConfig": "config",
    "AdapterFileError": "files",
    "AutoPeftModel": "familiar",
    "AutoPeftModelForCausalLM": "familiar",
    "AutoPeftModelForFeatureExtraction": "familiar",
    "AutoPeftModelForQuestionAnswering": "familiar",
    "AutoPeftModelForSeq2SeqLM": "familiar",
    "AutoPeftModelForSequenceClassification": "familiar",
    "AutoPeftModelForTokenClassification": "familiar",
    "LoraConfig": "methods.lora",
    "MergeReport": "merging",
    "PeftConfig": "familiar",
    "PeftModel": "familiar",
    "Plan": "planning",
    "TaskType": "config",
    "export": "exporting",
    "get_peft_config": "familiar",
    "get_peft_model": "familiar",
    "get_pet_config": "familiar",
    "get_pet_model": "familiar",
    "is_wrapped": "model",
    "load": "wrapping",
    "load_quantized": "integrations.transformers",
    "merge": "wrapping",
    "plan": "wrapping",
    "quantize": "quantization",
    "unwrap": "wrapping",
    "wrap": "wrapping",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pyadapt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if TYPE_CHECKING:
    from .config import AdapterConfig, TaskType
    from .exporting import export
    from .familiar import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        PeftConfig,
        PeftModel,
        get_peft_config,
        get_peft_model,
        get_pet_config,
        get_pet_model,
    )
    from .files import AdapterFileError
    from .integrations.transformers import load_quantized
    from .merging import MergeReport
    from .methods.lora import LoraConfig
    from .model import is_wrapped
    from .planning import Plan
    from .quantization import quantize
    from .wrapping import load, merge, plan, unwrap, wrap
