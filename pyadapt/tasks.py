"""What a task asks of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import AUTO_CLASSES, TASK_HEADS, AdapterConfig, TaskType
from .layer import base_modules
from .tying import output_embedding


def check_task(config: AdapterConfig, model: nn.Module) -> None:
    """Refuse a task that a transformers model has no head for; other models' heads are known to their authors alone.

    Raises:
        ValueError: so it is.
    """
    task, settings = config.task_type, getattr(model, "config", None)
    if not isinstance(task, TaskType) or settings is None or not hasattr(model, "get_input_embeddings"):
        return
    missing = _missing(task, config, model, settings)
    if missing and AUTO_CLASSES[task].removeprefix("Auto") not in type(model).__name__:
        raise ValueError(
            f"task_type={task.value}: this {type(model).__name__} has no {missing}; load the model with "
            f"{AUTO_CLASSES[task]}, name its head in modules_to_save, or leave task_type out"
        )


def _missing(task: TaskType, config: AdapterConfig, model: nn.Module, settings: Any) -> str:
    """What the model lacks for `task`, in words; empty where that is nothing."""
    if task == TaskType.SEQ_2_SEQ_LM:
        return "" if getattr(settings, "is_encoder_decoder", False) else "encoder and decoder"
    if task == TaskType.CAUSAL_LM:
        return "" if output_embedding(model) is not None else "output head over the vocabulary"
    heads = (*TASK_HEADS.get(task, ()), *(getattr(config, "modules_to_save", None) or ()))
    found = any(path.rpartition(".")[2] in heads or path in heads for path, _ in base_modules(model))
    return "" if found or task not in TASK_HEADS else f"head called {' or '.join(TASK_HEADS[task])}"
