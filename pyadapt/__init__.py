"""pyadapt: parameter-efficient fine-tuning at close to the cost of the frozen model.

Wrap a model, train it with any loop, save the adapter, or export the merged model::

    model = pyadapt.wrap(model, pyadapt.LoraConfig(r=16))
    model.save_pretrained("adapter")
    pyadapt.export(model, "merged")

The public names are loaded when first used: importing pyadapt costs what importing torch costs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import distributed as distributed
    from . import optim as optim
    from .config import AdapterConfig as AdapterConfig
    from .config import TaskType as TaskType
    from .exporting import export as export
    from .familiar import (
        AutoPeftModel as AutoPeftModel,
    )
    from .familiar import (
        AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
    )
    from .familiar import (
        AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
    )
    from .familiar import (
        AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
    )
    from .familiar import (
        AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
    )
    from .familiar import (
        AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
    )
    from .familiar import (
        AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
    )
    from .familiar import (
        PeftConfig as PeftConfig,
    )
    from .familiar import (
        PeftModel as PeftModel,
    )
    from .familiar import (
        get_layer_status as get_layer_status,
    )
    from .familiar import (
        get_model_status as get_model_status,
    )
    from .familiar import (
        get_peft_config as get_peft_config,
    )
    from .familiar import (
        get_peft_model as get_peft_model,
    )
    from .familiar import (
        get_peft_model_state_dict as get_peft_model_state_dict,
    )
    from .familiar import (
        get_pet_config as get_pet_config,
    )
    from .familiar import (
        get_pet_model as get_pet_model,
    )
    from .familiar import (
        hotswap_adapter as hotswap_adapter,
    )
    from .familiar import (
        prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap,
    )
    from .familiar import (
        rescale_adapter_scale as rescale_adapter_scale,
    )
    from .familiar import (
        set_peft_model_state_dict as set_peft_model_state_dict,
    )
    from .files import AdapterFileError as AdapterFileError
    from .integrations.callbacks import AdaLoraCallback as AdaLoraCallback
    from .integrations.callbacks import AdapterCheckpoint as AdapterCheckpoint
    from .integrations.checkpoints import last_checkpoint as last_checkpoint
    from .integrations.transformers import load_quantized as load_quantized
    from .kbit import prepare_model_for_int8_training as prepare_model_for_int8_training
    from .kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .merged import MergeReport as MergeReport
    from .methods.adalora import AdaLoraConfig as AdaLoraConfig
    from .methods.adalora.orthogonality import orthogonality as orthogonality
    from .methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
    from .methods.ia3 import IA3Config as IA3Config
    from .methods.lora import LoraConfig as LoraConfig
    from .methods.lora.afterwards import (
        get_eva_state_dict as get_eva_state_dict,
    )
    from .methods.lora.afterwards import (
        initialize_lora_eva_weights as initialize_lora_eva_weights,
    )
    from .methods.lora.afterwards import (
        replace_lora_weights_loftq as replace_lora_weights_loftq,
    )
    from .methods.lycoris.loha import LoHaConfig as LoHaConfig
    from .methods.lycoris.lokr import LoKrConfig as LoKrConfig
    from .methods.prefix import PrefixTuningConfig as PrefixTuningConfig
    from .methods.prompts.config import (
        MultitaskPromptTuningConfig as MultitaskPromptTuningConfig,
    )
    from .methods.prompts.config import (
        MultitaskPromptTuningInit as MultitaskPromptTuningInit,
    )
    from .methods.prompts.config import (
        PromptEncoderConfig as PromptEncoderConfig,
    )
    from .methods.prompts.config import (
        PromptEncoderReparameterizationType as PromptEncoderReparameterizationType,
    )
    from .methods.prompts.config import (
        PromptTuningConfig as PromptTuningConfig,
    )
    from .methods.prompts.config import (
        PromptTuningInit as PromptTuningInit,
    )
    from .model import is_wrapped as is_wrapped
    from .planning import Plan as Plan
    from .quantization import quantize as quantize
    from .wrapping import load as load
    from .wrapping import merge as merge
    from .wrapping import plan as plan
    from .wrapping import unwrap as unwrap
    from .wrapping import wrap as wrap

__version__ = "0.1.0"

# Where each public name lives.
_HOMES = {
    "AdaLoraCallback": "integrations.callbacks",
    "AdapterCheckpoint": "integrations.callbacks",
    "last_checkpoint": "integrations.checkpoints",
    "AdaLoraConfig": "methods.adalora",
    "AdapterConfig": "config",
    "AdapterFileError": "files",
    "AdaptionPromptConfig": "methods.adaption_prompt",
    "AutoPeftModel": "familiar",
    "AutoPeftModelForCausalLM": "familiar",
    "AutoPeftModelForFeatureExtraction": "familiar",
    "AutoPeftModelForQuestionAnswering": "familiar",
    "AutoPeftModelForSeq2SeqLM": "familiar",
    "AutoPeftModelForSequenceClassification": "familiar",
    "AutoPeftModelForTokenClassification": "familiar",
    "IA3Config": "methods.ia3",
    "LoHaConfig": "methods.lycoris.loha",
    "LoKrConfig": "methods.lycoris.lokr",
    "LoraConfig": "methods.lora",
    "MergeReport": "merged",
    "MultitaskPromptTuningConfig": "methods.prompts.config",
    "MultitaskPromptTuningInit": "methods.prompts.config",
    "PeftConfig": "familiar",
    "PeftModel": "familiar",
    "Plan": "planning",
    "PrefixTuningConfig": "methods.prefix",
    "PromptEncoderConfig": "methods.prompts.config",
    "PromptEncoderReparameterizationType": "methods.prompts.config",
    "PromptTuningConfig": "methods.prompts.config",
    "PromptTuningInit": "methods.prompts.config",
    "TaskType": "config",
    "export": "exporting",
    "get_eva_state_dict": "methods.lora.afterwards",
    "get_layer_status": "familiar",
    "get_model_status": "familiar",
    "get_peft_config": "familiar",
    "get_peft_model": "familiar",
    "get_peft_model_state_dict": "familiar",
    "get_pet_config": "familiar",
    "get_pet_model": "familiar",
    "hotswap_adapter": "familiar",
    "initialize_lora_eva_weights": "methods.lora.afterwards",
    "is_wrapped": "model",
    "load": "wrapping",
    "load_quantized": "integrations.transformers",
    "merge": "wrapping",
    "orthogonality": "methods.adalora.orthogonality",
    "plan": "wrapping",
    "prepare_model_for_compiled_hotswap": "familiar",
    "prepare_model_for_int8_training": "kbit",
    "prepare_model_for_kbit_training": "kbit",
    "quantize": "quantization",
    "replace_lora_weights_loftq": "methods.lora.afterwards",
    "rescale_adapter_scale": "familiar",
    "set_peft_model_state_dict": "familiar",
    "unwrap": "wrapping",
    "wrap": "wrapping",
}

# Modules that are named by their users.
_MODULES = ("distributed", "optim")

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'pyadapt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
