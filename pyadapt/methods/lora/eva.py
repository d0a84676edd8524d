"""EVA: A starts as the directions in which a layer's inputs vary most, and ranks go where inputs vary more.

The right singular vectors V' of each layer's centred inputs over batches of data are followed by incremental PCA until
they stand still. All components of all layers are then ordered by the share of the variance that they explain, and the
first of them, as many as the ranks of all layers together, are kept: a layer's rank is how many of its own are among
them, at most `rho` times what the configuration says, and a layer with none gets no adapter. A is V' (over the root of the
singular values with `whiten`), B is zero. Layers whose inputs are the same (q, k and v) share one analysis.

Sources: Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", 2024;
Ross et al., "Incremental Learning for Robust Visual Tracking", 2008 (incremental PCA).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base import base_of
from ...method import Preparation
from ...planning import make_plan
from .inits import INITS, Init, start_kaiming

if TYPE_CHECKING:
    from ...planning import Plan
    from .config import LoraConfig

logger = logging.getLogger("pyadapt")

# Of the random start of the approximate SVD, as in PEFT: the same data gives the same A.
SVD_SEED = 42
SVD_ROUNDS = 4
# Batches after which components that still move are taken as they are.
MOST_BATCHES = 10_000

Forward = Callable[[nn.Module, Any], Any]


@dataclass
class EvaOptions:
    """What `eva_config` says; names and defaults are those of PEFT.

    Attributes:
        rho: how many times its configured rank a layer may get at most, at least 1 (which moves no ranks).
        tau: cosine similarity to the same component of the batch before, from which it counts as standing still.
        use_label_mask: leave positions out whose label is `label_mask_value`.
        label_mask_value: see there.
        whiten: divide each component by the root of its singular value.
        adjust_scaling_factors: change alpha with the rank, so that alpha / r stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise ValueError(f"eva_config: rho={self.rho!r} is not at least 1")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"eva_config: tau={self.tau!r} is not in [0, 1]")


def complete_eva(config: LoraConfig) -> None:
    """Fill in `eva_config`.

    Raises:
        ValueError: an unknown key, or a value out of range.
    """
    given = config.eva_config or {}
    given = dict(given if isinstance(given, Mapping) else vars(given))
    known = inspect.signature(EvaOptions).parameters
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ValueError(f"eva_config has no {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    config.eva_config = asdict(EvaOptions(**given))


INITS["eva"] = Init(start_kaiming, lambda *layer: None, complete_eva)


def prepare(plan: Plan, model: nn.Module, data: Any, forward: Forward | None = None) -> Preparation:
    """Run batches through the model as it is without adapters, and plan the ranks and first A that follow.

    Raises:
        ValueError: there is no data, or too little of it; the model is as it was.
    """
    if data is None:
        raise ValueError('init_lora_weights="eva" starts from data: wrap(model, config, data=<a DataLoader or a list>)')
    paths = [row.path for row in plan.layers if row.base_form == "linear"]
    return _plan_ranks(plan, model, eva_state(model, plan.config, paths, data, forward))


def eva_state(
    model: nn.Module, config: LoraConfig, paths: Sequence[str], loader: Iterable[Any], forward: Forward | None = None
) -> dict[str, Tensor]:
    """The A (rank, K) of each layer at `paths`, whose ranks sum up to the configured ones; some may be zero.

    Args:
        model: the model; its adapters, if any, are left out. It is run in evaluation mode, without gradients.
        config: ranks, and `eva_config`.
        paths: linear layers.
        loader: batches: mappings (called as keywords), tuples or lists (as arguments), or tensors; gone through again
            and again until the components stand still.
        forward: called with the model and a batch in place of the model.

    Raises:
        ValueError: no batch, batches with fewer rows than a layer has components, or a layer that no input reaches.
    """
    from ...model import is_wrapped

    if iter(loader) is loader:
        raise ValueError("data can be gone through once only; a DataLoader or a list of batches is needed")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if is_wrapped(model):
            stack.enter_context(model.disable_adapter())
        stack.enter_context(_evaluating(model))
        return _Analysis(model, config, paths, loader, forward or call_with).run()


def call_with(model: nn.Module, batch: Any) -> Any:
    """`model` called with a batch of any usual form."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


class _Analysis:
    """One run over the data; see `eva_state`."""

    def __init__(
        self, model: nn.Module, config: LoraConfig, paths: Sequence[str], loader: Iterable[Any], forward: Forward
    ) -> None:
        self.model, self.config, self.loader, self.forward = model, config, loader, forward
        self.options = EvaOptions(**(config.eva_config or {}))
        self.device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        self.budget = sum(config.rank_of(path) for path in paths)
        self.leader_of = self._same_inputs(paths)
        self.most = {path: round(config.rank_of(path) * self.options.rho) for path in paths}
        for leader in set(self.leader_of.values()):
            group = [path for path in paths if self.leader_of[path] == leader]
            most = min(max(self.most[path] for path in group), model.get_submodule(leader).in_features_of)
            self.most.update(dict.fromkeys(group, most))
