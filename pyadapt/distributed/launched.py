"""What the launcher, accelerate or transformers have said about the training to come.

Asked when a model is wrapped and when it starts to train. Nothing is imported for the question: where accelerate was
never imported it has said nothing but what its launcher left in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from .policy import Fsdp1Settings

# accelerate's names for what FSDP1's mixed precision casts to.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def engine_to_come() -> str | None:
    """The engine that will shard the model: "zero3", "fsdp1", "fsdp2"; None where none will, or it cannot be known."""
    state = accelerator_state()
    kind = getattr(state.get("distributed_type"), "value", None)
    if kind == "FSDP":
        return f"fsdp{getattr(state.get('fsdp_plugin'), 'fsdp_version', 1)}"
    if kind == "DEEPSPEED":
        return "zero3" if any(plugin.zero_stage == 3 for plugin in _plugins(state)) else None
    transformers = sys.modules.get("transformers.integrations.deepspeed")
    if transformers is not None and transformers.is_deepspeed_zero3_enabled():
        return "zero3"
    if state:
        return None
    if _says("ACCELERATE_USE_DEEPSPEED"):
        return "zero3" if _zero_stage() == 3 else None
    # On a CPU accelerate passes FSDP over.
    if _says("ACCELERATE_USE_FSDP") and not _says("ACCELERATE_USE_CPU"):
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    return None


def check_synchronised() -> None:
    """Refuse to train where several processes were started, and accelerate takes each of them for the only one.

    On a CPU it does so without a word: no gradient would be exchanged, and each process would see all of the data.

    Raises:
        RuntimeError: so it is.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    alone = _partial_state().get("num_processes")
    if started > 1 and alone == 1:
        raise RuntimeError(
            f"{started} processes were started, but accelerate takes each for the only one (num_processes=1), so "
            "nothing would be exchanged between them. On a CPU, make the process group before the Accelerator or the "
            'TrainingArguments: accelerate.PartialState(backend="gloo"), or Accelerator(kwargs_handlers='
            '[InitProcessGroupKwargs(backend="gloo")])'
        )


def classes_of_blocks(model: Any) -> list[str] | None:
    """Names of the classes that accelerate makes units or groups of FSDP; None where it goes by something else."""
    plugin = accelerator_state().get("fsdp_plugin")
    if plugin is None:
        by_class = os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "TRANSFORMER_BASED_WRAP"
        named: Any = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    else:
        by_class = getattr(plugin.auto_wrap_policy, "__name__", "") == "transformer_auto_wrap_policy"
        named = plugin.transformer_cls_names_to_wrap
    names = named.split(",") if isinstance(named, str) else list(named or ())
    names = [name.strip() for name in names if name.strip()] or list(getattr(model, "_no_split_modules", None) or ())
    return names if by_class else None


def fsdp1_settings(classes: tuple[str, ...] | None) -> Fsdp1Settings:
    """What accelerate has been told of FSDP1, in its plugin or, before there is one, by its launcher."""
    plugin = accelerator_state().get("fsdp_plugin")
    if plugin is None:
        use_orig_params = "FSDP_USE_ORIG_PARAMS" not in os.environ or _says("FSDP_USE_ORIG_PARAMS")
    else:
        use_orig_params = bool(plugin.use_orig_params)
    return Fsdp1Settings(use_orig_params, classes, PRECISIONS.get(precision()))


def half_precision() -> bool:
    """Whether DeepSpeed trains in bf16 or fp16, as far as it has been said by now; "auto" follows accelerate."""
    configs = [getattr(plugin, "deepspeed_config", None) or {} for plugin in _plugins(accelerator_state())]
    said = [config.get(kind, {}).get("enabled") for config in configs for kind in PRECISIONS]
    return precision() in PRECISIONS or any(value is True for value in said)


def _plugins(state: Any) -> list[Any]:
    """accelerate's DeepSpeed plugins."""
    held = state.get("deepspeed_plugins")
    return list(held.values()) if isinstance(held, dict) else [] if held is None else [held]


def precision() -> str:
    """accelerate's mixed precision: "no", "bf16", "fp16", ..."""
    said = accelerator_state().get("_mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    return str(said).lower()


def _says(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on", "y", "t")


def _zero_stage() -> int | None:
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path and os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return json.load(file).get("zero_optimization", {}).get("stage")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    return int(stage) if stage.isdigit() else None


def accelerator_state() -> Any:
    """What every `Accelerator` of this process knows, by attribute; empty where there is none yet."""
    module = sys.modules.get("accelerate.state")
    return {} if module is None else module.AcceleratorState._shared_state


def _partial_state() -> Any:
    module = sys.modules.get("accelerate.state")
    return {} if module is None else module.PartialState._shared_state
