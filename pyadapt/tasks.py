"""What a task asks of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import AUTO_CLASSES, TASK_HEADS, AdapterConfig, TaskType
from .layer import base_modules
from .surgery import original_class
from .targets import matches
from .tying import output_embedding

# What the name of a class says of its head, whatever that is called in the model.
_NAMES: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("Classification",),
    TaskType.TOKEN_CLS: ("Classification",),
    TaskType.QUESTION_ANS: ("QuestionAnswering",),
    TaskType.CAUSAL_LM: ("ForCausalLM", "LMHead", "ForConditionalGeneration"),
    TaskType.SEQ_2_SEQ_LM: ("ForConditionalGeneration", "ForSpeechToText", "EncoderDecoderModel"),
}


def check_task(config: AdapterConfig, model: nn.Module) -> None:
    """Refuse a task that a model of transformers has no head for; other models' heads are known to their authors alone.

    Raises:
        ValueError: so it is.
    """
    task, cls = config.task_type, original_class(model)
    if not isinstance(task, TaskType) or cls.__module__.partition(".")[0] != "transformers":
        return
    missing = _missing(task, config, model, cls.__name__)
    if missing:
        raise ValueError(
            f"task_type={task.value}: this {cls.__name__} has no {missing}; load the model with {AUTO_CLASSES[task]}, "
            "name its head in modules_to_save, or leave task_type out"
        )


def _missing(task: TaskType, config: AdapterConfig, model: Any, name: str) -> str:
    """What the model lacks for `task`, in words; empty where that is nothing."""
    if task == TaskType.SEQ_2_SEQ_LM and not getattr(model.config, "is_encoder_decoder", False):
        return "encoder and decoder"
    if any(part in name for part in _NAMES.get(task, ("",))):
        return ""
    if task not in TASK_HEADS:
        return "" if output_embedding(model) is not None else "output head over the vocabulary"
    heads = [*TASK_HEADS[task], *(getattr(config, "modules_to_save", None) or ())]
    found = any(matches(heads, path) for path, _ in base_modules(model))
    return "" if found else f"head called {' or '.join(TASK_HEADS[task])}"
