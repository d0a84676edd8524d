"""Checkpoints of DeepSpeed's engine over a wrapped model: adapters and their optimizer state, for any number of ranks.

DeepSpeed's own hold each rank's part of everything, the frozen weights included, and can be read by as many ranks only.
These hold, by parameter names, whole tensors that rank 0 writes into one file:

    <folder>/<tag>/pyadapt_training.pt     <folder>/latest

The engine keeps its class; this one object gets a cached dynamic class derived from it, as an adapted layer does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..files import AdapterFileError, write_atomically
from ..surgery import adopt
from ..trained import Trained, check_trained_state, frozen_names
from . import agreement
from .sharding import sharding_of

CHECKPOINT_FILE = "pyadapt_training.pt"
_FORMAT = 1
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def adopt_engine(engine: Any) -> None:
    """Let `engine`, which has a wrapped model, write and read checkpoints of its adapters."""
    if not isinstance(engine, AdapterEngine):
        adopt(engine, AdapterEngine)


class AdapterEngine(nn.Module):
    """Mixin of a `DeepSpeedEngine` whose model is wrapped; the signatures are its own."""

    def save_checkpoint(
        self: Any,
        save_dir: Any,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = True,
    ) -> bool:
        """Save what training changes; every rank has to call.

        Raises:
            RankError: rank 0 could not write.
        """
        if not _has_own_checkpoints(self):
            return super().save_checkpoint(save_dir, tag, client_state or {}, save_latest, True)  # type: ignore[misc]
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        agreement.agree("saving a checkpoint", {"the tag": tag})
        self.optimizer.checkpoint_event_prologue()
        state = _gathered(self, client_state or {})
        self.optimizer.checkpoint_event_epilogue()
        with agreement.together("saving a checkpoint"):
            if agreement.rank() == 0:
                os.makedirs(os.path.join(save_dir, tag), exist_ok=True)
                path = os.path.join(save_dir, tag, CHECKPOINT_FILE)
                write_atomically(path, lambda temporary: torch.save(state, temporary))
                if save_latest:
                    write_atomically(os.path.join(save_dir, "latest"), lambda temporary: _write(temporary, tag))
        return True

    def load_checkpoint(
        self: Any,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[Any, Any]:
        """Load what `save_checkpoint` wrote, on any number of ranks; DeepSpeed's own checkpoints as it does.

        Raises:
            AdapterFileError: the file is damaged, or belongs to another model, adapter or optimizer; nothing changed.
        """
        latest = os.path.join(load_dir, "latest")
        if tag is None and os.path.isfile(latest):
            with open(latest, encoding="utf-8") as file:
                tag = file.read().strip()
        path = os.path.join(load_dir, str(tag), CHECKPOINT_FILE)
        if tag is None or not os.path.isfile(path):
            return super().load_checkpoint(  # type: ignore[misc]
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )
        with agreement.together("loading a checkpoint"):
            state = _read(path)
            check_trained_state(self.module, state["model"])
            if load_optimizer_states and not load_module_only:
                _check_optimizer(self, state["optimizer"], path)
        self.optimizer.checkpoint_event_prologue()
        _fill(self, state, load_optimizer_states and not load_module_only)
        if not load_module_only:
            if load_lr_scheduler_states and self.lr_scheduler is not None and state["lr_scheduler"] is not None:
                self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            for name, value in state["counters"].items():
                setattr(self, name, value)
        self.optimizer.checkpoint_event_epilogue()
        return path, state["client_state"]

    def module_state_dict(
        self: Any,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """The model's state dict; DeepSpeed excludes parameters by names that a frozen bias does not have in it."""
        found = super().module_state_dict(destination, prefix, keep_vars, False)  # type: ignore[misc]
        for name in frozen_names(self.module, found, prefix) if exclude_frozen_parameters else ():
            del found[name]
        return found

    def zero_gather_16bit_weights_on_model_save(self: Any) -> bool:
        """True: what is gathered is small."""
        return _is_zero3(self) or super().zero_gather_16bit_weights_on_model_save()  # type: ignore[misc]

    def _zero3_consolidated_16bit_state_dict(self: Any, exclude_frozen_parameters: bool = True) -> Any:
        """What training changes, on rank 0; Trainer and accelerate ask for it to save the model."""
        if not _is_zero3(self):
            return super()._zero3_consolidated_16bit_state_dict(True)  # type: ignore[misc]
        tensors = _gathered_model(self.module)
        return tensors if agreement.rank() == 0 else None

    def save_16bit_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused: it writes the file of a whole model.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "save_16bit_model would write a whole model's file with the adapters beside the base in it: "
            "model.save_pretrained(folder) on every rank writes the adapters, pyadapt.export the merged model"
        )


def _is_zero3(engine: Any) -> bool:
    return bool(engine.zero_optimization_partition_weights())


def _has_own_checkpoints(engine: Any) -> bool:
    """Whether all of the optimizer's state can be gathered by name: ZeRO-3, elementwise, and none of it on disk."""
    if not _is_zero3(engine) or engine.zero_nvme_offload_optimizer() or not hasattr(engine.optimizer, "fp16_groups"):
        return False
    return all(
        not isinstance(value, Tensor) or value.numel() == 1 or (value.shape == flat.shape and value.is_floating_point())
        for flat in engine.optimizer.fp32_partitioned_groups_flat
        for value in engine.optimizer.optimizer.state.get(flat, {}).values()
    )


def _optimized(engine: Any) -> list[tuple[str, Any, Any]]:
    """(name, parameter, the flat tensor of this rank that holds its part) of all that the optimizer has."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_partitioned_groups_flat, strict=True)
    return [(names[parameter], parameter, flat) for group, flat in groups for parameter in group]


def _gathered(engine: Any, client_state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "model": _gathered_model(engine.module),
        "optimizer": _gathered_optimizer(engine),
        "lr_scheduler": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "client_state": dict(client_state),
    }


def _gathered_model(model: Any) -> dict[str, Tensor]:
    """What training changes, whole, by names in the state dict: on the CPU, on every rank."""
    tensors: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        tensors[name] = torch.empty_like(value, device="cpu").copy_(value.detach())

    _visit(model, keep, write=False)
    return tensors


def _visit(model: nn.Module, take: Callable[[str, Tensor], None], write: bool) -> None:
    """Call `take` with each tensor that training changes, whole, by its name in the state dict."""
    trained, sharding = Trained(model), sharding_of(model)
    assert sharding is not None
    for path, module in model.named_modules(remove_duplicate=False):
        start = f"{path}." if path else ""
        own = {**module._parameters, **module._buffers}
        wanted = [
            name
            for name, value in own.items()
            if value is not None and name not in module._non_persistent_buffers_set and start + name in trained
        ]
        if wanted:
            with sharding.whole([module], write), torch.no_grad():
                for name in wanted:
                    take(start + name, getattr(module, name))


def _gathered_optimizer(engine: Any) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine.optimizer
    state: dict[str, dict[str, Any]] = {}
    masters = {}
    for name, parameter, flat in _optimized(engine):
        masters[name] = safe_get_full_fp32_param(parameter).cpu().clone()
        kept = state[name] = {}
        for key, value in optimizer.optimizer.state.get(flat, {}).items():
            is_elementwise = isinstance(value, Tensor) and value.shape == flat.shape
            kept[key] = safe_get_full_optimizer_state(parameter, key).cpu().clone() if is_elementwise else value
    return {
        "masters": masters,
        "state": state,
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.optimizer.param_groups
        ],
        "loss_scaler": {
            key: value for key, value in vars(optimizer.loss_scaler).items() if isinstance(value, (bool, int, float))
        },
    }


def _check_optimizer(engine: Any, saved: Mapping[str, Any], path: str) -> None:
    wrong = sorted({name for name, _, _ in _optimized(engine)} ^ saved["masters"].keys())
    if wrong or len(saved["groups"]) != len(engine.optimizer.optimizer.param_groups):
        raise AdapterFileError(
            f"{path} was written with another optimizer: {', '.join(wrong[:4]) or 'its parameter groups'} differ"
        )


def _fill(engine: Any, state: Mapping[str, Any], with_optimizer: bool) -> None:
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    def fill(name: str, place: Tensor) -> None:
        place.copy_(state["model"][name])

    _visit(engine.module, fill, write=True)
    saved, optimizer = state["optimizer"], engine.optimizer
    for name, parameter, flat in _optimized(engine):
        # The masters hold more than the weights in half precision do.
        safe_set_local_fp32_param(parameter, _part(saved["masters"][name], parameter))
        for key, value in saved["state"][name].items() if with_optimizer else ():
            own = optimizer.optimizer.state[flat]
            if isinstance(value, Tensor) and value.shape == parameter.ds_shape and value.dim() > 0:
                if key not in own:
                    own[key] = torch.zeros_like(flat)
                safe_set_local_optimizer_state(parameter, _part(value, parameter), key)
            else:
                own[key] = value.clone() if isinstance(value, Tensor) else value
    if with_optimizer:
        for group, values in zip(optimizer.optimizer.param_groups, saved["groups"], strict=True):
            group.update(values)
        vars(optimizer.loss_scaler).update(saved["loss_scaler"])


def _part(value: Tensor, parameter: Any) -> Tensor:
    """The values of this rank's partition of `parameter`, with DeepSpeed's padding behind the last."""
    count = parameter.ds_tensor.numel()
    start = count * torch.distributed.get_rank(parameter.ds_process_group)
    part = torch.zeros(count, dtype=value.dtype)
    own = value.flatten()[start : start + count]
    part[: own.numel()] = own
    return part


def _read(path: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterFileError(
            f"{path} is damaged, or holds objects (client_state, scheduler) of classes that have to be allowed first "
            f"by torch.serialization.add_safe_globals: {error}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise AdapterFileError(f"{path} is no checkpoint of this version of pyadapt")
    return state


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
