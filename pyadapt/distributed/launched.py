"""What the launcher, accelerate or transformers have said about the training to come, and whether it can go well.

Asked when a model is wrapped and when it starts to train. Nothing is imported for the question: where accelerate was
never imported it has said nothing but what its launcher left in the environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import sys
from typing import Any

import torch
from torch import nn

from .policy import Fsdp1Settings, check_fsdp1, check_fsdp2, fsdp_auto_wrap_policy
from .preparing import prepare_for_sharding

logger = logging.getLogger("pyadapt")

# accelerate's names for what FSDP1's mixed precision casts to.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

# The least version of what drives each engine: older ones lack what pyadapt or the engine itself needs here.
LEAST = {
    "zero3": {"deepspeed": (0, 16), "accelerate": (1, 1)},
    "fsdp1": {"torch": (2, 6), "accelerate": (1, 1)},
    "fsdp2": {"torch": (2, 6), "accelerate": (1, 6)},
}


def engine_to_come() -> str | None:
    """The engine that will shard the model: "zero3", "fsdp1", "fsdp2"; None where none will, or it cannot be known."""
    state = _accelerator_state()
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


def get_ready(model: nn.Module) -> None:
    """Before a plain model is wrapped: let its quantised weights be what the engine to come can shard.

    Raises:
        RuntimeError: the engine is too old.
        ValueError: it cannot shard them; nothing was changed.
    """
    engine = engine_to_come()
    if engine is not None:
        check_versions(engine)
        report = prepare_for_sharding(model, engine)
        if report.layers or report.united:
            logger.info("%s", report)


def check_ready(model: nn.Module) -> None:
    """Once a model is wrapped: refuse settings of the engine to come that cannot work.

    Raises:
        ValueError: so it is; the message has the line of accelerate's configuration that mends it.
    """
    engine = engine_to_come()
    if engine == "zero3":
        _check_one_dtype(model)
    classes = _classes_of_blocks(model)
    if engine == "fsdp2" and classes is not None:
        check_fsdp2(model, classes, upcast=_precision() != "no")
    if engine != "fsdp1" or classes is None:
        return
    plugin = _accelerator_state().get("fsdp_plugin")
    if plugin is not None:
        check_fsdp1(model, _fsdp1_settings(None))
        # What peft's models are given by Trainer: the blocks as they were asked for, and what is trained.
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model, classes)
        return
    try:
        check_fsdp1(model, _fsdp1_settings(tuple(classes)))
    except ValueError as error:
        # There is no Accelerator yet; the script may give it our policy.
        check_fsdp1(model, _fsdp1_settings(None))
        logger.warning("%s; or accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)", error)


def check_versions(engine: str) -> None:
    """Refuse an engine that is too old.

    Args:
        engine: see `engine_to_come`.

    Raises:
        RuntimeError: so it is; what there is and what is needed is named.
    """
    for package, least in LEAST[engine].items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
        if numbers < least:
            needed = ".".join(map(str, least))
            raise RuntimeError(
                f"{package} {found} is too old to train a wrapped model under {engine}: {needed} or newer is needed "
                f'(pip install "{package}>={needed}")'
            )


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


def _check_one_dtype(model: nn.Module) -> None:
    """Refuse what DeepSpeed, where it is not told of half precision, ends with a bare assertion for."""
    trained = {parameter.dtype: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(trained) > 1 and not _halves():
        (one, first), (other, second) = list(trained.items())[:2]
        raise ValueError(
            f"DeepSpeed cannot train {one} and {other} beside each other, as {first} and {second}: set "
            '`mixed_precision: bf16` ("bf16": {"enabled": true} in its own configuration), or give both one dtype '
            '(adapter_dtype="base")'
        )


def _halves() -> bool:
    """Whether DeepSpeed trains in bf16 or fp16, as far as it has been said by now; "auto" follows accelerate."""
    configs = [getattr(plugin, "deepspeed_config", None) or {} for plugin in _plugins(_accelerator_state())]
    said = [config.get(kind, {}).get("enabled") for config in configs for kind in PRECISIONS]
    return _precision() in PRECISIONS or any(value is True for value in said)


def _plugins(state: Any) -> list[Any]:
    """accelerate's DeepSpeed plugins."""
    held = state.get("deepspeed_plugins")
    return list(held.values()) if isinstance(held, dict) else [] if held is None else [held]


def _classes_of_blocks(model: Any) -> list[str] | None:
    """Names of the classes that accelerate makes units or groups of FSDP; None where it goes by something else."""
    plugin = _accelerator_state().get("fsdp_plugin")
    if plugin is None:
        by_class = os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "TRANSFORMER_BASED_WRAP"
        named: Any = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    else:
        by_class = getattr(plugin.auto_wrap_policy, "__name__", "") == "transformer_auto_wrap_policy"
        named = plugin.transformer_cls_names_to_wrap
    names = named.split(",") if isinstance(named, str) else list(named or ())
    names = [name.strip() for name in names if name.strip()] or list(getattr(model, "_no_split_modules", None) or ())
    return names if by_class else None


def _fsdp1_settings(classes: tuple[str, ...] | None) -> Fsdp1Settings:
    """What accelerate has been told of FSDP1, in its plugin or, before there is one, by its launcher."""
    plugin = _accelerator_state().get("fsdp_plugin")
    if plugin is None:
        use_orig_params = "FSDP_USE_ORIG_PARAMS" not in os.environ or _says("FSDP_USE_ORIG_PARAMS")
    else:
        use_orig_params = bool(plugin.use_orig_params)
    return Fsdp1Settings(use_orig_params, classes, PRECISIONS.get(_precision()))


def _precision() -> str:
    """accelerate's mixed precision: "no", "bf16", "fp16", ..."""
    said = _accelerator_state().get("_mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
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


def _accelerator_state() -> Any:
    module = sys.modules.get("accelerate.state")
    return {} if module is None else module.AcceleratorState._shared_state


def _partial_state() -> Any:
    module = sys.modules.get("accelerate.state")
    return {} if module is None else module.PartialState._shared_state
