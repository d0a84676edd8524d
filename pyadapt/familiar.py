"""The names that users of Hugging Face PEFT and of the earlier PET know."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import checkpoint
from .config import AUTO_CLASSES, AdapterConfig, TaskType, as_config
from .dtypes import LIKE_BASE
from .files import AdapterFileError, Path
from .method import DATA_FOLLOWS
from .model import AdaptedModel, hotswapping, is_wrapped
from .model.status import LayerStatus, ModelStatus
from .wrapping import load, wrap


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> nn.Module:
    """`pyadapt.wrap` under PEFT's name.

    Args:
        model: any module.
        peft_config: as in `wrap`.
        adapter_name: what the adapter is called.
        autocast_adapter_dtype: False gives the adapter the dtype of the weights it adapts.
        revision: hub revision of the base model, for the adapter's file.
        low_cpu_mem_usage: accepted; a fresh adapter has its first values here in any case.
    """
    config = as_config(peft_config)
    if not autocast_adapter_dtype:
        config = config.replaced(adapter_dtype=LIKE_BASE)
    if revision is not None:
        config = config.replaced(revision=revision)
    return wrap(model, config, adapter_name, data=DATA_FOLLOWS)


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """A configuration from a dict whose `peft_type` (or `pet_type`) names the method."""
    return AdapterConfig.from_dict(config_dict)


def get_peft_model_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """The tensors of one adapter under their keys in a file."""
    return checkpoint.as_in_file(_wrapped(model), adapter_name, state_dict)


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Give an adapter values, by their keys in a file.

    Raises:
        AdapterFileError: keys are missing, extra or misshapen; the model is unchanged.
    """
    hotswapping.set_values(_wrapped(model), adapter_name, peft_model_state_dict)


def hotswap_adapter(model: nn.Module, model_name_or_path: Path, adapter_name: str, **hub: Any) -> None:
    """`model.hotswap_adapter` under PEFT's name, also for a compiled model."""
    hub.pop("torch_device", None)
    _wrapped(model).hotswap_adapter(model_name_or_path, adapter_name, **hub)


def prepare_model_for_compiled_hotswap(model: nn.Module, *, target_rank: int) -> None:
    """`model.pad_ranks` under PEFT's name. Scalings need no preparation: another one is multiplied into the weights."""
    _wrapped(model).pad_ranks(target_rank)


def rescale_adapter_scale(model: nn.Module, multiplier: float) -> contextlib.AbstractContextManager[None]:
    """`model.rescaled` under PEFT's name."""
    return _wrapped(model).rescaled(multiplier)


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """`model.get_layer_status` as a function, as in PEFT."""
    return _wrapped(model).get_layer_status()


def get_model_status(model: nn.Module) -> ModelStatus:
    """`model.get_model_status` as a function, as in PEFT."""
    return _wrapped(model).get_model_status()


def _wrapped(model: nn.Module) -> AdaptedModel:
    model = getattr(model, "_orig_mod", model)
    if not is_wrapped(model):
        raise ValueError(f"this {type(model).__name__} carries no adapters of pyadapt")
    return model


class _KnowsWrapped(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, nn.Module) and is_wrapped(instance)


class PeftModel(metaclass=_KnowsWrapped):
    """No model has this class, as each keeps its own; `isinstance(model, PeftModel)` asks if it is wrapped."""

    @staticmethod
    def from_pretrained(
        model: nn.Module,
        model_id: Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **hub: Any,
    ) -> nn.Module:
        """`pyadapt.load` under PEFT's name; for `autocast_adapter_dtype` see `get_peft_model`."""
        if not autocast_adapter_dtype:
            hub["adapter_dtype"] = LIKE_BASE
        return load(model, model_id, adapter_name, is_trainable, **hub)


class _AutoPeftModel:
    """Loads a base model and the adapter on it from the adapter's folder alone."""

    auto_class: str = "AutoModel"

    @classmethod
    def from_pretrained(
        cls, path: Path, adapter_name: str = "default", is_trainable: bool = False, **base_options: Any
    ) -> nn.Module:
        """The base model that the adapter in `path` names, wrapped with it.

        Args:
            path: adapter folder or hub name.
            adapter_name: what the adapter is called.
            is_trainable: whether to go on training it.
            base_options: passed to the base model's `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            AdapterFileError: the folder is no adapter, or does not say which base model it is for.
        """
        import transformers

        config = AdapterConfig.from_pretrained(path)
        if not config.base_model_name_or_path:
            raise AdapterFileError(
                f"{path} does not name its base model; load that yourself, then pyadapt.load(model, path)"
            )
        auto = getattr(transformers, cls.auto_class)
        base = auto.from_pretrained(config.base_model_name_or_path, **base_options)
        low_memory = base_options.get("low_cpu_mem_usage", False)
        return load(base, path, adapter_name, is_trainable, low_cpu_mem_usage=low_memory)


def _auto(task: str, auto_class: str) -> type[_AutoPeftModel]:
    name = f"AutoPeftModel{task}"
    return type(name, (_AutoPeftModel,), {"auto_class": auto_class, "__doc__": _AutoPeftModel.__doc__})


class AutoPeftModel(_AutoPeftModel):
    """Loads a base model and its adapter; the class of the base follows from the adapter's task."""

    @classmethod
    def from_pretrained(
        cls, path: Path, adapter_name: str = "default", is_trainable: bool = False, **base_options: Any
    ) -> nn.Module:
        """As `AutoPeftModelForCausalLM.from_pretrained`; the adapter's task or `auto_mapping` names the class."""
        config = AdapterConfig.from_pretrained(path)
        if isinstance(config.task_type, TaskType):
            auto_class = AUTO_CLASSES[config.task_type]
        elif config.auto_mapping is not None:
            auto_class = config.auto_mapping["base_model_class"]
        else:
            raise AdapterFileError(
                f"{path} names neither a task nor a model class; use one of the AutoPeftModelFor* names"
            )
        return _auto("", auto_class).from_pretrained(path, adapter_name, is_trainable, **base_options)


AutoPeftModelForCausalLM = _auto("ForCausalLM", "AutoModelForCausalLM")
AutoPeftModelForSeq2SeqLM = _auto("ForSeq2SeqLM", "AutoModelForSeq2SeqLM")
AutoPeftModelForSequenceClassification = _auto("ForSequenceClassification", "AutoModelForSequenceClassification")
AutoPeftModelForTokenClassification = _auto("ForTokenClassification", "AutoModelForTokenClassification")
AutoPeftModelForQuestionAnswering = _auto("ForQuestionAnswering", "AutoModelForQuestionAnswering")
AutoPeftModelForFeatureExtraction = _auto("ForFeatureExtraction", "AutoModel")

PeftConfig = AdapterConfig
get_pet_model = get_peft_model
get_pet_config = get_peft_config
