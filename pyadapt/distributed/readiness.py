"""Whether the engine to come can train a model: it is made ready for it, or refused with the line that mends it."""

from __future__ import annotations

import importlib.metadata
import logging
import re

from torch import nn

from . import launched
from .policy import check_fsdp1, check_fsdp2, fsdp_auto_wrap_policy
from .preparing import prepare_for_sharding

logger = logging.getLogger("pyadapt")

# The least version of what drives each engine: older ones lack what pyadapt or the engine itself needs here.
LEAST = {
    "zero3": {"deepspeed": (0, 16), "accelerate": (1, 1)},
    "fsdp1": {"torch": (2, 6), "accelerate": (1, 1)},
    "fsdp2": {"torch": (2, 6), "accelerate": (1, 6)},
}


def get_ready(model: nn.Module) -> None:
    """Before a plain model is wrapped: let its quantised weights be what the engine to come can shard.

    Raises:
        RuntimeError: the engine is too old.
        ValueError: it cannot shard them; nothing was changed.
    """
    engine = launched.engine_to_come()
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
    engine = launched.engine_to_come()
    if engine == "zero3":
        _check_one_dtype(model)
    classes = launched.classes_of_blocks(model)
    if engine == "fsdp2" and classes is not None:
        check_fsdp2(model, classes, upcast=launched.precision() != "no")
    if engine != "fsdp1" or classes is None:
        return
    plugin = launched.accelerator_state().get("fsdp_plugin")
    if plugin is not None:
        check_fsdp1(model, launched.fsdp1_settings(None))
        # What peft's models are given by Trainer: the blocks as they were asked for, and what is trained.
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model, classes)
        return
    try:
        check_fsdp1(model, launched.fsdp1_settings(tuple(classes)))
    except ValueError as error:
        # There is no Accelerator yet; the script may give it our policy.
        check_fsdp1(model, launched.fsdp1_settings(None))
        logger.warning("%s; or accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)", error)


def check_versions(engine: str) -> None:
    """Refuse an engine that is too old.

    Args:
        engine: see `launched.engine_to_come`.

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


def _check_one_dtype(model: nn.Module) -> None:
    """Refuse what DeepSpeed, where it is not told of half precision, ends with a bare assertion for."""
    trained = {parameter.dtype: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(trained) > 1 and not launched.half_precision():
        (one, first), (other, second) = list(trained.items())[:2]
        raise ValueError(
            f"DeepSpeed cannot train {one} and {other} beside each other, as {first} and {second}: set "
            '`mixed_precision: bf16` ("bf16": {"enabled": true} in its own configuration), or give both one dtype '
            '(adapter_dtype="base")'
        )
