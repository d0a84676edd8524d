"""PEFT's names for starting an adapter that is on the model already: from data (EVA), from original weights (LoftQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import attach
from ...files import Path
from ...layer import adapted_layers
from ...originals import OriginalWeights
from ...planning import make_plan
from . import eva, loftq
from .config import LoraConfig

if TYPE_CHECKING:
    from ...model import AdaptedModel
    from ...planning import Plan


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: eva.Forward | None = None,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """The A (rank, K) that EVA finds for each layer, by path; a rank may be zero.

    Args:
        model: a plain or a wrapped model; it is unchanged.
        dataloader: see `eva.eva_state`.
        peft_config: the configuration; by default that of the adapter called `adapter_name`.
        forward_fn: called with the model and a batch in place of the model.
        adapter_name: see `peft_config`.
    """
    plan = make_plan(model, _config_of(model, adapter_name) if peft_config is None else peft_config)
    return eva.state_for(plan, model, dataloader, forward_fn)


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: eva.Forward | None = None,
    adapter_name: str = "default",
) -> None:
    """Let an adapter that `get_peft_model` has made for `init_lora_weights="eva"` start from data.

    `pyadapt.wrap(model, config, data=dataloader)` does both at once.

    Args:
        model: a wrapped model.
        dataloader: see `eva.eva_state`.
        eva_state_dict: the result of `get_eva_state_dict`, in place of data.
        forward_fn: called with the model and a batch in place of the model.
        adapter_name: the adapter, which gets new ranks and new first values.

    Raises:
        ValueError: there is no such adapter, it is not for EVA, there is neither data nor a state, or the state is of
            another model.
    """
    config = _config_of(model, adapter_name)
    wrapped: AdaptedModel = model  # type: ignore[assignment]
    if config.init_lora_weights != "eva":
        raise ValueError(f"adapter {adapter_name!r} has init_lora_weights={config.init_lora_weights!r}, not 'eva'")
    plan = make_plan(model, config)
    if eva_state_dict is None:
        start = eva.prepare(plan, model, dataloader, forward_fn)
    else:
        _check_state(plan, eva_state_dict)
        start = eva.with_ranks(plan, model, eva_state_dict)
    active, trainable = list(wrapped.adapter_state.active), not config.inference_mode
    beside = f"{adapter_name}_next"
    while beside in wrapped.peft_config:
        beside += "_"
    wrapped.add_planned(start.plan, beside, trainable=trainable)
    attach.fill(wrapped, beside, start.values)
    wrapped.delete_adapter(adapter_name)
    wrapped.rename_adapter(beside, adapter_name)
    wrapped.set_adapter(active)


def _check_state(plan: Plan, state: Mapping[str, Tensor]) -> None:
    inputs = {row.path: row.in_features for row in plan.layers}
    for path, A in state.items():
        if path not in inputs:
            raise ValueError(f"eva_state_dict has {path}, which the adapter is not on; it is on {', '.join(inputs)}")
        if A.dim() != 2 or A.shape[1] != inputs[path]:
            raise ValueError(f"eva_state_dict: {path} is {tuple(A.shape)}, not (rank, {inputs[path]})")


def _config_of(model: nn.Module, adapter_name: str) -> LoraConfig:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"the model has no adapter called {adapter_name!r}; there are {', '.join(configs) or 'none'}")
    return configs[adapter_name]


def replace_lora_weights_loftq(
    model: nn.Module,
    model_path: Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give an adapter over quantised weights the values of LoftQ (one iteration, which leaves the weights alone).

    Args:
        model: a wrapped model whose layers are quantised.
        model_path: the model's checkpoint from before; by default the folder that the model was loaded from.
        adapter_name: the adapter.
        callback: called with the model and a layer's path after each replacement; False takes it back.

    Raises:
        ValueError: no layer with this adapter is quantised, the adapter started from its weights (PiSSA), or there is
            no checkpoint to read.
        RuntimeError: adapters are merged, so that the weights are not what they are beside an adapter.
        AdapterFileError: the checkpoint has not the weights; the adapter is unchanged.
    """
    found = {
        path: layer for path, layer in adapted_layers(model) if layer.base.quantized and adapter_name in layer.adapters
    }
    if not found:
        raise ValueError(
            f"no layer with an adapter called {adapter_name!r} is quantised, so there is nothing to make up"
        )
    units: dict[str, Any] = {path: layer.unit(adapter_name) for path, layer in found.items()}
    merged = [path for path, layer in found.items() if layer.unmerged is not None]
    if merged:
        raise RuntimeError(f"an adapter is merged into {merged[0]}; unmerge_adapter() first")
    started = [path for path, unit in units.items() if getattr(unit, "start_A", None) is not None]
    if started:
        raise ValueError(f"adapter {adapter_name!r} on {started[0]} started from its weight; LoftQ is another start")
    path_of_model = model_path or getattr(model, "name_or_path", None)
    if not path_of_model:
        raise ValueError("model_path: the folder of the model from before it was quantised is needed")
    originals = OriginalWeights(path_of_model, model)
    fitted = {}
    for path, layer in found.items():
        r = units[path].parameters_of_factors()[0].shape[0]
        fitted[path], _ = loftq.fit_to_original(originals, path, layer, r, units[path].scaling, 1)
    for path, factors in fitted.items():
        own = units[path].parameters_of_factors()
        before = [factor.detach().clone() for factor in own]
        _copy(own, factors)
        if callback is not None and not callback(model, path):
            _copy(own, before)
        else:
            units[path].fits_quantization = True


def _copy(own: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(own, values, strict=True):
            parameter.copy_(value)
