"""The main verbs: wrap, unwrap, plan, load, merge. Each works on the model in place and returns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import attach, checkpoint
from .config import as_config
from .distributed import readiness
from .files import Path
from .model import AdaptedModel, is_wrapped, make_adapted
from .planning import Plan, make_plan, prepare
from .resuming import fill_training_state, read_training_state


def wrap(model: nn.Module, config: Any, adapter_name: str = "default", data: Any = None) -> nn.Module:
    """Put adapters into `model` and freeze everything else.

    The model stays the same object with the same class name, parameters and state-dict keys; a targeted
    layer carries its adapter beside its weight. Wrapping a wrapped model adds another adapter, which is not active.

    Args:
        model: any `torch.nn.Module`; a transformers model keeps `generate`, `save_pretrained` and the rest.
        config: a `LoraConfig` or another method's, a dict, a path to JSON or YAML, or a `peft` configuration.
        adapter_name: what the adapter is called.
        data: batches for an initialisation that looks at data (`init_lora_weights="eva"`): an iterable that can be
            gone through again, such as a `DataLoader`.

    Returns:
        `model`, of which everything was checked before anything was changed.

    Raises:
        ValueError: the configuration does not fit the model.
        RuntimeError: the model is compiled or sharded already, or its forward is patched.
    """
    config = as_config(config)
    if is_wrapped(model):
        model.add_adapter(adapter_name, config, data=data)
        return model
    attach.check_adapter_name(adapter_name, [])
    start = prepare(model, config, data)
    readiness.get_ready(model)
    adapted = _put(model, start.plan, adapter_name, trainable=True, values=start.values)
    start.finish()
    return adapted


def unwrap(model: nn.Module) -> nn.Module:
    """Remove every adapter: the base model again, with its own class and the parameters that it trained before."""
    return _wrapped(model, "unwrap").unload()


def plan(model: nn.Module, config: Any) -> Plan:
    """What `wrap(model, config)` would do: layers, shapes, parameters, kernels. Changes nothing.

    Raises:
        ValueError: the configuration does not fit the model.
    """
    return make_plan(model, as_config(config))


def load(
    model: nn.Module,
    path: Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    strict: bool = True,
    adapter_dtype: Any = None,
    low_cpu_mem_usage: bool = False,
    **hub: Any,
) -> nn.Module:
    """Wrap `model` with the adapter in `path`: a folder in PEFT format, a hub name, or a file of kohya or LyCORIS.

    Args:
        model: the base model, or a wrapped one that gets a further adapter.
        path: folder with `adapter_config.json` and `adapter_model.safetensors`; or a single `.safetensors` file whose
            keys are those of kohya or LyCORIS (docs/lycoris.md).
        adapter_name: what the adapter is called here.
        is_trainable: False freezes it and puts the model into evaluation mode.
        strict: refuse files with missing, extra or misshapen tensors.
        adapter_dtype: what the adapter is held in, whatever the file has, as in a configuration: by default float32.
        low_cpu_mem_usage: let the tensors of the file be the adapter's weights, rather than drawing first values and
            copying over them. What a file lacks (without `strict`) starts as usual.
        hub: `revision`, `token`, `cache_dir` for a hub name; for a single file `prefix`, what the keys to take begin
            with, where those of two models in it fit this one.

    Raises:
        AdapterFileError: the files are missing, damaged or do not fit; the model is unchanged.
    """
    if is_wrapped(model):
        model.load_adapter(path, adapter_name, is_trainable, strict, adapter_dtype, low_cpu_mem_usage, **hub)
        return model
    attach.check_adapter_name(adapter_name, [])
    read = checkpoint.read_adapter(model, path, strict=strict, adapter_dtype=adapter_dtype, **hub)
    wholes = read.wholes(model, units=low_cpu_mem_usage)
    tensors = read.besides(wholes)
    state = read_training_state(read.folder) if is_trainable else {}
    if is_trainable:
        readiness.get_ready(model)
    model = _put(model, read.plan, adapter_name, trainable=is_trainable, tensors=tensors, wholes=wholes, state=state)
    return model if is_trainable else model.eval()


def merge(model: nn.Module, original: Path | None = None) -> nn.Module:
    """Fold the active adapters into the weights; the plain model, without pyadapt, in the same object.

    Args:
        model: a wrapped model.
        original: checkpoint of the model from before it was quantised; by default int8 weights are dequantised.

    Raises:
        ValueError: a merged weight would not be finite; the model is unchanged.
    """
    return _wrapped(model, "merge").merge_and_unload(original=original)


def _put(
    model: nn.Module,
    plan: Plan,
    name: str,
    *,
    trainable: bool,
    tensors: Mapping[str, Tensor] | None = None,
    values: Mapping[str, Mapping[str, Tensor]] | None = None,
    wholes: Mapping[str, Mapping[str, Tensor]] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Wrap a plain model; whatever fails, it is plain again."""
    adapted = make_adapted(model)
    try:
        adapted.add_planned(plan, name, trainable=trainable, values=wholes)
        checkpoint.fill_adapter(adapted, name, tensors or {})
        fill_training_state(adapted, name, state or {})
        attach.fill(adapted, name, values or {})
        if trainable:
            readiness.check_ready(adapted)
    except BaseException:
        adapted.unload()
        raise
    return adapted


def _wrapped(model: nn.Module, action: str) -> AdaptedModel:
    if not is_wrapped(model):
        raise ValueError(f"cannot {action}: this {type(model).__name__} carries no adapters of pyadapt")
    return model
