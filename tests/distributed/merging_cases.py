"""Merging and exporting under an engine, beside a single process. Run on the ranks of a gang."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from engines import Options, mean_over_ranks, start
from methods_cases import CASES
from models import FAMILIES, build, model_batch, tied_llama
from safetensors.torch import load_file
from torch import Tensor

import pyadapt
from pyadapt.distributed.sharding import sharding_of, whole
from pyadapt.layer import adapted_layers, base_modules

LORA = {"peft_type": "LORA", "r": 4, "init_lora_weights": False}
# Name -> configuration, on a model of its own.
TIED: dict[str, dict[str, Any]] = {
    "tied": {**LORA, "target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "untied": {**LORA, "target_modules": ["embed_tokens", "lm_head"]},
}


def wrapped(name: str, base: str, engine: str | None) -> Any:
    """The model of a case, with values of the adapter that matter.

    Args:
        name: of the case, in `TIED` or `methods_cases.CASES`.
        base: "fp32", "bf16" or "int8".
        engine: that it is made for.
    """
    dtype = torch.bfloat16 if base == "bf16" else torch.float32
    family, config = ("llama", TIED[name]) if name in TIED else CASES[name]
    model: Any = tied_llama(dtype=dtype) if name in TIED else build(family, dtype=dtype)
    if base == "int8":
        pyadapt.quantize(model, storage_dtype=torch.float32 if (engine or "").startswith("fsdp1") else None)
    torch.manual_seed(3)
    model = pyadapt.wrap(model, {"task_type": FAMILIES[family].task, **config})
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """The keys whose tensors are not equal, bit for bit."""
    return sorted(
        key
        for key in found.keys() | wanted.keys()
        if key not in found or key not in wanted or not torch.equal(found[key], wanted[key])
    )


def parts_of(model: Any) -> list[Tensor]:
    """What this rank holds of the base model."""
    sharding = sharding_of(model)
    assert sharding is not None
    kept = sharding.keep([module for _, module in base_modules(model)])
    # As bytes: those of int8 weights may look like NaNs.
    return [part.contiguous().flatten().view(torch.uint8) for _, part in kept]


def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of the adapted layers, whole."""
    found = {}
    for path, layer in adapted_layers(model):
        with whole(model, [layer]):
            found[path] = layer.base.matrix(layer)
    return found


def check_export(engine: str, name: str, base: str, folder: str) -> None:
    """The file and the report are those of a single process, and the model is as it was."""
    # On other ranks transformers writes nothing.
    alone = os.path.join(folder, f"{name}-{base}-alone")
    told = pyadapt.export(wrapped(name, base, None), alone)
    torch.distributed.barrier()
    wanted = load_file(os.path.join(alone, "model.safetensors"))
    model = wrapped(name, base, engine)
    runner = start(model, engine, Options())
    before = parts_of(model)
    path = os.path.join(folder, f"{name}-{base}-{engine}")
    report = pyadapt.export(model, path)
    found = load_file(os.path.join(path, "model.safetensors"))
    assert not differing(found, wanted), differing(found, wanted)
    assert str(report) == str(told)
    assert all(torch.equal(part, was) for part, was in zip(parts_of(model), before, strict=True))
    del runner


def check_in_place(engine: str, name: str, base: str, folder: str) -> None:
    """Merged weights are those of a single process; unmerging gives each rank its part back, bit for bit."""
    alone, model = wrapped(name, base, None), wrapped(name, base, engine)
    runner = start(model, engine, Options())
    before = parts_of(model)
    adapter = model.get_adapter_state_dict()
    alone.merge_adapter()
    model.merge_adapter()
    changed = sum(not torch.equal(part, was) for part, was in zip(parts_of(model), before, strict=True))
    # FSDP1 may have put all adapted layers of a unit on one rank.
    assert mean_over_ranks(torch.tensor(float(changed))) > 0, "nothing was merged"
    assert not differing(merged_weights(model), merged_weights(alone))
    held = sum(part.nbytes for _, part in model.adapter_state.parts_before)
    assert held <= sum(part.nbytes for part in before)
    model.unmerge_adapter()
    assert all(torch.equal(part, was) for part, was in zip(parts_of(model), before, strict=True))
    assert not differing(model.get_adapter_state_dict(), adapter)
    del runner


def check_all(check: Callable[..., None], engine: str, cases: Iterable[tuple[str, str]], folder: str) -> dict[str, str]:
    """Several cases (name, base), and what went wrong with which."""
    wrong = {}
    for name, base in cases:
        try:
            check(engine, name, base, folder)
        except Exception:
            wrong[f"{check.__name__} {name} {base}"] = traceback.format_exc(limit=-6)
    return wrong


def check_refusals(engine: str, folder: str) -> dict[str, str]:
    """What cannot be done with a sharded model is refused on every rank, and nothing is changed by it."""
    model = wrapped("lora", "fp32", engine)
    alone = wrapped("lora", "fp32", None)
    adapter = os.path.join(folder, "adapter")
    if torch.distributed.get_rank() == 0:
        alone.save_pretrained(adapter)
    torch.distributed.barrier()
    runner = start(model, engine, Options())
    before, trained = parts_of(model), model.get_adapter_state_dict()
    rank, batch = torch.distributed.get_rank(), model_batch("llama", rows=2)
    tries: dict[str, tuple[Callable[[], Any], str]] = {
        "merge_and_unload": (lambda: model.merge_and_unload(), r"export\(model, folder\)"),
        "merge": (lambda: pyadapt.merge(model), r"export\(model, folder\)"),
        "unwrap": (lambda: pyadapt.unwrap(model), r"disable_adapter\(\)"),
        "add_adapter": (lambda: model.add_adapter("other", LORA), "first, then shard"),
        "load_adapter": (lambda: model.load_adapter(adapter, "other"), "first, then shard"),
        "hotswap_adapter": (lambda: model.hotswap_adapter(adapter), "first, then shard"),
        "adapter_names": (lambda: model(**batch, adapter_names=["default"] * 2), "group the rows by adapter"),
        "pad_ranks": (lambda: model.pad_ranks(8), "first, then shard"),
        "delete_adapter": (lambda: model.delete_adapter("default"), "cannot delete an adapter"),
        "add_weighted_adapter": (
            lambda: model.add_weighted_adapter(["default"], [0.5], "combined"),
            "first, then shard",
        ),
        "a file in the folder's place": (
            lambda: pyadapt.export(model, os.path.join(adapter, "adapter_config.json") if rank else folder + "/out"),
            "is a file",
        ),
    }
    wrong = {}
    for name, (do, message) in tries.items():
        try:
            do()
            wrong[name] = "nothing was said"
        except (RuntimeError, ValueError) as error:
            if not re.search(message, str(error)):
                wrong[name] = traceback.format_exc(limit=-4)
    if list(model.peft_config) != ["default"] or differing(model.get_adapter_state_dict(), trained):
        wrong["afterwards"] = "the adapters are others"
    if not all(torch.equal(part, was) for part, was in zip(parts_of(model), before, strict=True)):
        wrong["afterwards"] = "the base is another"
    # A NaN in one adapter weight of the first rank alone cannot be: every rank sees the same, and says so.
    unit = next(layer for _, layer in adapted_layers(model)).unit("default")
    with torch.no_grad(), whole(model, [unit], write=True):
        unit.lora_A[0, 0] = float("nan")
    for name, do in (("merge_adapter", model.merge_adapter), ("export", lambda: pyadapt.export(model, folder + "/no"))):
        try:
            do()
            wrong[f"{name} of a NaN"] = "nothing was said"
        except ValueError as error:
            if "NaN or an infinity" not in str(error):
                wrong[f"{name} of a NaN"] = str(error)
    if not all(torch.equal(part, was) for part, was in zip(parts_of(model), before, strict=True)):
        wrong["after a NaN"] = "the base is another"
    # A scaling is no parameter.
    model.rescale(0.5)
    del runner
    return wrong
