"""Multitask prompt tuning: a shared prompt, times a matrix of low rank for each task (Wang et al. 2023).

    prompt of task t = P * (U_t V_t)        elementwise; P (n, d), U (tasks, n, r), V (tasks, r, d)

Learnt on source tasks, P and their matrices are what a target task starts from (`prompt_tuning_init`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config import AdapterConfig
from ...method import AdapterUnit, Preparation, refuse_data, register
from ...planning import Plan
from ...prompt_learning import PROMPT_KEY
from .config import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from .method import InputPromptMethod, total_tokens
from .prompt_tuning import start_values
from .starts import source_tensors
from .unit import DECODER, InputPrompt

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptUnit(InputPrompt):
    """The shared prompt and the tasks' matrices; `task_ids` (B,) of a call says which row of a batch is of which task.

    Attributes:
        embeddings: P, (parts n, d).
        columns: U, (tasks, parts n, r).
        rows: V, (tasks, r, d).
    """

    file_keys: ClassVar[dict[str, str]] = {"embeddings": PROMPT_KEY, "columns": COLUMNS, "rows": ROWS}
    prompts_decoder: ClassVar[bool] = True
    embeddings: nn.Parameter
    columns: nn.Parameter
    rows: nn.Parameter

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # As between calls, so that the first one finds what later ones do: torch.compile guards on it.
        self.call_arguments, self.call_repeats = {}, False

    @classmethod
    def prompt_shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """See `InputPrompt.prompt_shapes`."""
        total, tasks, rank = total_tokens(config), config.num_tasks, config.num_ranks
        return {
            "embeddings": (total, config.token_dim),
            "columns": (tasks, total, rank),
            "rows": (tasks, rank, config.token_dim),
        }

    @classmethod
    def shapes(cls, config: Any, path: str, base: Any, layer: Any) -> dict[str, tuple[int, ...]]:
        """See `AdapterUnit.shapes`; a decoder's unit shares those of the encoder's."""
        return {} if config.parts[path] == DECODER else cls.prompt_shapes(config)

    def join(self, units: Sequence[AdapterUnit]) -> None:
        """See `AdapterUnit.join`."""
        if self.has_prompt and self is not units[0]:
            for name, parameter in units[0].named_parameters(recurse=False):
                self.register_parameter(name, parameter)

    def by_file_key(self) -> dict[str, nn.Parameter]:
        """See `AdapterUnit.by_file_key`; those that a decoder's unit shares are the encoder's."""
        return {} if self.part == DECODER else super().by_file_key()

    def initialize(self, config: Any, path: str, base: Any, layer: Any) -> None:
        """P from N(0, 1), U and V from N(0, 0.02^2); other starts come from `MultitaskPromptTuning.prepare`."""
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.normal_(parameter, std=1.0 if name == "embeddings" else 0.02)

    def prompt(self, rows: int) -> Tensor:
        """See `InputPrompt.prompt`: (rows, parts n, d).

        Raises:
            ValueError: the call was given no `task_ids`, or other ones than the batch and the tasks allow.
        """
        ids = self.call_arguments.get("task_ids")
        tasks = self.columns.shape[0]
        if ids is None:
            raise ValueError("multitask prompt tuning needs task_ids: the task of each row, model(..., task_ids=...)")
        ids = torch.as_tensor(ids, device=self.columns.device)
        # One for all, as in PEFT, or one a row.
        fits = ids.dim() == 1 and ids.shape[0] in (1, rows) and rows > 0
        # A beam search makes several rows of one.
        fits = fits or (self.call_repeats and ids.dim() == 1 and ids.shape[0] > 0 and rows % ids.shape[0] == 0)
        if not fits or ids.is_floating_point():
            raise ValueError(f"task_ids of shape {tuple(ids.shape)} for {rows} rows: one whole number a row is needed")
        if not torch.compiler.is_compiling() and (int(ids.min()) < 0 or int(ids.max()) >= tasks):
            raise ValueError(f"task_ids={ids.tolist()}: the adapter has tasks 0 to {tasks - 1}")
        ids = ids.repeat_interleave(rows // ids.shape[0])
        return self.embeddings * (self.columns[ids] @ self.rows[ids])


@register
class MultitaskPromptTuning(InputPromptMethod):
    """Multitask prompt tuning."""

    peft_type: ClassVar[str] = MultitaskPromptTuningConfig.peft_type
    config_class: ClassVar[type[AdapterConfig]] = MultitaskPromptTuningConfig
    units: ClassVar[dict[str, type[AdapterUnit]]] = {"stack": MultitaskPromptUnit}
    call_arguments: ClassVar[tuple[str, ...]] = ("task_ids",)
    file_keys: ClassVar[tuple[str, ...]] = (PROMPT_KEY, COLUMNS, ROWS)

    @staticmethod
    def prepare(plan: Plan, model: nn.Module, data: Any) -> Preparation:
        """See `LayerMethod.prepare`: a text, or what was learnt on source tasks."""
        refuse_data(data)
        if not plan.config.from_source:
            return Preparation(plan, start_values(plan, model))
        return Preparation(plan, {plan.layers[0].path: _from_source(plan.config)})


def _from_source(config: Any) -> dict[str, Tensor]:
    """What a target task starts from, by attribute.

    Raises:
        ValueError: the file of the source tasks does not fit, or has no such task.
    """
    kinds = MultitaskPromptTuningInit
    shared_alone = config.prompt_tuning_init == kinds.ONLY_SOURCE_SHARED
    shapes = {MultitaskPromptUnit.file_keys[name]: s for name, s in MultitaskPromptUnit.prompt_shapes(config).items()}
    wanted = {PROMPT_KEY: shapes[PROMPT_KEY]} if shared_alone else shapes
    source = source_tensors(config.prompt_tuning_init_state_dict_path, wanted)
    values = {"embeddings": source[PROMPT_KEY]}
    if shared_alone:
        return values
    if config.num_tasks != 1:
        raise ValueError(
            f"num_tasks={config.num_tasks}: {config.prompt_tuning_init.value} makes one target task of the source "
            "tasks; leave the option at 1"
        )
    task, tasks = config.prompt_tuning_init_task or 0, source[COLUMNS].shape[0]
    if source[ROWS].shape[0] != tasks:
        raise ValueError(
            f"prompt_tuning_init_state_dict_path={config.prompt_tuning_init_state_dict_path!r}: {COLUMNS} has {tasks} "
            f"tasks, {ROWS} has {source[ROWS].shape[0]}"
        )
    if config.prompt_tuning_init == kinds.EXACT_SOURCE_TASK and not 0 <= task < tasks:
        raise ValueError(f"prompt_tuning_init_task={task}: the source has tasks 0 to {tasks - 1}")
    for name, key in (("columns", COLUMNS), ("rows", ROWS)):
        of_tasks = source[key]
        exact = config.prompt_tuning_init == kinds.EXACT_SOURCE_TASK
        values[name] = of_tasks[task : task + 1] if exact else of_tasks.mean(0, keepdim=True)
    return values
