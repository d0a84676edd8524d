"""Models that bitsandbytes made int8, under engines that shard parameters. Run on the ranks of a gang."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from engines import Options, start, train
from models import build, model_batch
from tolerance import assert_close, assert_near

import pyadapt
from pyadapt.base import base_of
from pyadapt.base.int8 import Int8
from pyadapt.distributed import prepare_for_sharding
from pyadapt.layer import base_modules

# All linear layers: bitsandbytes' own forward, which serves those without an adapter, rounds its inputs.
CONFIG = {"peft_type": "LORA", "r": 4, "init_lora_weights": False, "target_modules": "all-linear"}


def quantised(family: str, folder: str, **options: Any) -> Any:
    """A tiny model as transformers loads it for bitsandbytes; `folder` holds the dense one."""
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = BitsAndBytesConfig(**(options or {"load_in_8bit": True}))
        return type(build(family)).from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def wrapped(model: Any) -> Any:
    """The model with an adapter, the same on every rank."""
    torch.manual_seed(3)
    return pyadapt.wrap(model, {"task_type": "CAUSAL_LM", **CONFIG})


def train_under(engine: str, family: str, folder: str) -> dict[str, Any]:
    """Losses of an engine against those of bitsandbytes' own layers in one process; bytes that each rank holds.

    Converted before wrapping, and after it.
    """
    alone = wrapped(quantised(family, folder))
    wanted = train(alone, None, lambda step: model_batch(family, 100 + step, rows=4), Options())
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        model = quantised(family, folder)
        if when == "before":
            report = prepare_for_sharding(model, engine)
            shared = wrapped(model)
        else:
            shared = wrapped(model)
            report = prepare_for_sharding(shared, engine)
        held = int8_bytes(shared)
        losses = train(shared, engine, lambda step: model_batch(family, 100 + step, rows=4), Options())
        assert_near(torch.tensor(losses), torch.tensor(wanted), "loss")
        ours, theirs = shared.get_adapter_state_dict(), alone.get_adapter_state_dict()
        for key, value in theirs.items():
            assert_close(ours[key], value, "gradient", torch.float32, key)
        found[when] = {
            "report": str(report),
            "layers": len(report.converted),
            "counted": report.bytes,
            "whole": held,
            "shard": int8_bytes(shared),
        }
    return found


def int8_bytes(model: Any) -> int:
    """Bytes of int8 weights and scales that this rank holds."""
    total = 0
    for _, layer in base_modules(model):
        if base_of(layer) is not Int8:
            continue
        for part in Int8.stored(layer).values():
            held: Any = getattr(part, "ds_tensor", part)
            held = held.to_local() if hasattr(held, "to_local") else held
            total += held.numel() * held.element_size()
    return total


def shards_of(engines: list[str], family: str) -> dict[str, tuple[int, int]]:
    """Bytes of pyadapt's own int8 weights that a rank holds before and after each engine shards them."""
    found = {}
    for engine in engines:
        model = wrapped(pyadapt.quantize(build(family)))
        before = int8_bytes(model)
        start(model, engine, Options())
        found[engine] = before, int8_bytes(model)
    return found
