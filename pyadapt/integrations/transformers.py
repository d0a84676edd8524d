"""pyadapt's int8 weights as a quantisation method of transformers, so that its own save and load know them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

QUANT_METHOD = "pyadapt_int8"


@functools.cache
def _quantizer_classes() -> tuple[type, type]:
    """The (configuration, quantizer) classes, registered with transformers the first time they are needed."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(QUANT_METHOD)
    class Int8Config(QuantizationConfigMixin):
        """What `config.json` says of a model with pyadapt's int8 weights."""

        def __init__(self, skip: Iterable[str] | None = None, **kwargs: Any) -> None:
            self.quant_method = QUANT_METHOD  # type: ignore[assignment]
            self.skip = None if skip is None else list(skip)

    @register_quantizer(QUANT_METHOD)
    class Int8Quantizer(HfQuantizer):
        """Gives the empty model int8 layers before transformers fills them from a checkpoint."""

        quantization_config: Int8Config
        requires_calibration = False

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
            from ..base.int8 import make_empty_int8
            from ..quantization import layers_to_quantize

            for path in layers_to_quantize(model, self.quantization_config.skip):
                make_empty_int8(model.get_submodule(path))
            return model

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True

    # Found again by `__getattr__` below, so that a quantised model can be pickled.
    Int8Config.__qualname__, Int8Quantizer.__qualname__ = "Int8Config", "Int8Quantizer"
    return Int8Config, Int8Quantizer


def __getattr__(name: str) -> Any:
    if name in ("Int8Config", "Int8Quantizer"):
        return _quantizer_classes()[name == "Int8Quantizer"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is one of transformers' own (where transformers was never imported, none is)."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def mark_quantized(model: Any, skip: Iterable[str] | None) -> None:
    """Leave on a quantised transformers model what its `save_pretrained` and Trainer ask for."""
    config_class, quantizer_class = _quantizer_classes()
    config = config_class(skip)
    model.hf_quantizer = quantizer_class(config)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config


def forget_quantization(model: Any) -> None:
    """Take off what `mark_quantized` or transformers left, for a model whose layers are all dense again."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def load_quantized(path: str, auto_class: Any = None, **kwargs: Any) -> Any:
    """Load a transformers model that was saved after `pyadapt.quantize`.

    Args:
        path: the folder, or a hub name.
        auto_class: the class whose `from_pretrained` is called; by default the one that `config.json` names.
        kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: the checkpoint was not written from a model that pyadapt quantised.
    """
    import transformers

    _quantizer_classes()
    config = transformers.AutoConfig.from_pretrained(path)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method != QUANT_METHOD:
        raise ValueError(f"{path} holds no int8 weights of pyadapt (quant_method is {method!r})")
    if auto_class is None:
        auto_class = getattr(transformers, config.architectures[0])
    return auto_class.from_pretrained(path, **kwargs)
