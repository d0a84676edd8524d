"""EVA: A starts as the directions in which a layer's inputs vary most, and ranks go where inputs vary more.

The right singular vectors V' of each layer's centred inputs over batches of data are followed by incremental PCA until
they stand still. All components of all layers are then ordered by the share of the variance that they explain, and the
first of them, as many as the ranks of all layers together, are kept: a layer's rank is how many of its own are among
them, at most `rho` times what the configuration says, and a layer with none gets no adapter. A is V' (over the root of
the singular values with `whiten`), B is zero. Layers whose inputs are the same (q, k and v) share one analysis.

The ranks are in the file's configuration, so that it loads without data.

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
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base import BaseWeight, base_of
from ...distributed.sharding import running
from ...method import DATA_FOLLOWS, Preparation
from ...planning import make_plan
from .inits import INITS, Init, start_kaiming
from .pca import IncrementalPca

if TYPE_CHECKING:
    from ...planning import Plan
    from .config import LoraConfig

logger = logging.getLogger("pyadapt")

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


def _check_eva(*layer: Any) -> None:
    """Every linear layer will do."""


INITS["eva"] = Init(start_kaiming, _check_eva, complete_eva)


def prepare(plan: Plan, model: nn.Module, data: Any, forward: Forward | None = None) -> Preparation:
    """Run batches through the model as it is without adapters, and plan the ranks and first A that follow.

    Raises:
        ValueError: there is no data, or too little of it; the model is as it was.
    """
    if data is DATA_FOLLOWS:
        return Preparation(plan)
    if data is None:
        raise ValueError('init_lora_weights="eva" starts from data: wrap(model, config, data=<a DataLoader or a list>)')
    return with_ranks(plan, model, state_for(plan, model, data, forward))


def state_for(plan: Plan, model: nn.Module, data: Iterable[Any], forward: Forward | None = None) -> dict[str, Tensor]:
    """`eva_state` of the linear layers of a plan."""
    paths = [row.path for row in plan.layers if _kind(model, row.path).form == "linear"]
    return eva_state(model, plan.config, paths, data, forward)


def eva_state(
    model: nn.Module, config: LoraConfig, paths: Sequence[str], loader: Iterable[Any], forward: Forward | None = None
) -> dict[str, Tensor]:
    """The A (rank, K) of each layer at `paths`, whose ranks sum up to the configured ones; some may be zero.

    Args:
        model: the model; its adapters, if any, are left out. It is run in evaluation mode, without gradients.
        config: ranks, and `eva_config`.
        paths: linear layers.
        loader: batches: mappings (called as keywords), tuples or lists (as arguments), or tensors; gone through again
            and again until the components stand still. Under torch.distributed each process adds the rows of its own.
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
        stack.enter_context(running(model))
        return _analyse(model, config, paths, loader, forward or call_with)


def call_with(model: nn.Module, batch: Any) -> Any:
    """`model` called with a batch of any usual form."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _analyse(
    model: nn.Module, config: LoraConfig, paths: Sequence[str], loader: Iterable[Any], forward: Forward
) -> dict[str, Tensor]:
    options = EvaOptions(**(config.eva_config or {}))
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def run(batch: Any, see: Callable[[str, Tensor], None], watched: Iterable[str]) -> None:
        batch = _to_device(batch, device)
        with _inputs_of(model, watched, see, _positions(batch, options, model)):
            forward(model, batch)

    first = next(iter(loader), None)
    if first is None:
        raise ValueError("data holds no batch")
    leader_of = _same_inputs(paths, lambda see: run(first, see, paths))
    most = {path: round(config.rank_of(path) * options.rho) for path in paths}
    analyses: dict[str, IncrementalPca] = {}
    for leader in dict.fromkeys(leader_of.values()):
        group = [path for path in paths if leader_of[path] == leader]
        count = min(max(most[path] for path in group), _kind(model, leader).shape(model.get_submodule(leader))[1])
        most.update(dict.fromkeys(group, count))
        analyses[leader] = IncrementalPca(count, options.tau)
    ranks, rows = dict(most), 0

    def learn(path: str, x: Tensor) -> None:
        nonlocal rows
        rows = max(rows, len(x))
        if len(x) >= analyses[path].count:
            analyses[path].update(x.float())

    for turn, batch in _again_and_again(loader):
        moving = [path for path, pca in analyses.items() if not bool(pca.still[: ranks[path]].all())]
        if not moving:
            break
        waiting = [path for path, pca in analyses.items() if pca.components is None]
        if turn and waiting:
            raise ValueError(
                f"the largest batch has {rows} rows, fewer than the {analyses[waiting[0]].count} components of "
                f"{waiting[0]}; larger batches, a lower rank or rho are needed"
            )
        run(batch, learn, moving)
        if all(pca.components is not None for pca in analyses.values()):
            ranks = _distribute(analyses, leader_of, sum(map(config.rank_of, paths)))
    return {path: _start_of(analyses[leader_of[path]], ranks[path], options.whiten) for path in paths}


def _start_of(pca: IncrementalPca, rank: int, whiten: bool) -> Tensor:
    assert pca.components is not None
    A = pca.components[:rank]
    return A / pca.singular_values[:rank, None].sqrt() if whiten else A


def _distribute(analyses: Mapping[str, IncrementalPca], leader_of: Mapping[str, str], budget: int) -> dict[str, int]:
    """Rank of each layer: how many of its components are among the `budget` that explain most."""
    # In PEFT's order and by the same sort, which decides between layers of the same inputs and so of equal shares.
    paths = [*analyses, *(path for path in leader_of if path not in analyses)]
    owners = [path for path in paths for _ in analyses[leader_of[path]].explained]
    shares = torch.cat([analyses[leader_of[path]].explained for path in paths])
    count = Counter(owners[i] for i in shares.argsort(descending=True)[:budget].tolist())
    ranks = {path: count[path] for path in paths}
    for path in paths:
        leader = leader_of[path]
        if ranks[leader] < ranks[path]:
            # What is kept of an analysis is what its leader has.
            ranks[leader], ranks[path] = ranks[path], ranks[leader]
    return ranks


def _same_inputs(paths: Sequence[str], run: Callable[[Callable[[str, Tensor], None]], None]) -> dict[str, str]:
    """Path -> the first path whose layer has the same input, itself if there is none before."""
    digests: dict[str, bytes] = {}

    def see(path: str, x: Tensor) -> None:
        values = x.float().cpu().contiguous().numpy().tobytes()
        digests[path] = hashlib.sha1(values, usedforsecurity=False).digest()

    run(see)
    unreached = [path for path in paths if path not in digests]
    if unreached:
        raise ValueError(f"no input reaches {', '.join(unreached)} with this data; leave it out of target_modules")
    leaders: dict[bytes, str] = {}
    return {path: leaders.setdefault(digests[path], path) for path in paths}


def with_ranks(plan: Plan, model: nn.Module, state: Mapping[str, Tensor]) -> Preparation:
    """The plan with the ranks of `state`, without the layers that have none left."""
    config: LoraConfig = plan.config
    kept = [row.path for row in plan.layers if row.path not in state or len(state[row.path])]
    ranks = {path: len(state[path]) if path in state else config.rank_of(path) for path in kept}
    alphas = {path: config.alpha_of(path) for path in kept}
    if EvaOptions(**(config.eva_config or {})).adjust_scaling_factors:
        alphas = {path: alpha * ranks[path] / config.rank_of(path) for path, alpha in alphas.items()}
    if len(kept) < len(plan.layers):
        dropped = [row.path for row in plan.layers if row.path not in kept]
        logger.info("EVA gives no rank to %s", ", ".join(dropped))
        config = config.replaced(target_modules=kept)
    config = config.replaced(
        rank_pattern={path: rank for path, rank in ranks.items() if rank != config.r},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )
    values = {path: {"lora_A": state[path]} for path in kept if path in state}
    return Preparation(make_plan(model, config), values)


@contextlib.contextmanager
def _inputs_of(
    model: nn.Module, paths: Iterable[str], see: Callable[[str, Tensor], None], positions: Tensor | None
) -> Iterator[None]:
    """Inside the block `see` gets the path and the input (M, K) of each layer at `paths` that is called.

    Rows are left out where `positions`, flat, is False, if there is a position for each row.
    """

    def hook_for(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = (args or tuple(kwargs.values()))[0]
            rows = x.detach().reshape(-1, x.shape[-1])
            if positions is not None and len(positions) == len(rows):
                rows = rows[positions.to(rows.device)]
            see(path, _from_all_processes(rows))

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(hook_for(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _positions(batch: Any, options: EvaOptions, model: nn.Module) -> Tensor | None:
    """Which of a text batch's positions count, flat; None where the batch does not say."""
    if not isinstance(batch, Mapping) or not ("attention_mask" in batch or "input_ids" in batch):
        return None
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
    labels = batch.get("labels")
    # The labels of an encoder-decoder belong to other positions.
    beside = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if options.use_label_mask and labels is not None and labels.shape == mask.shape and not beside:
        return (mask.bool() & (labels != options.label_mask_value)).flatten()
    return mask.bool().flatten()


def _from_all_processes(rows: Tensor) -> Tensor:
    """The rows of all processes under torch.distributed, in their order; else `rows`."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(count) for count in counts)
    padded = nn.functional.pad(rows, (0, 0, 0, most - len(rows))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def _again_and_again(loader: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """(number of the turn, batch), from the beginning each time, up to `MOST_BATCHES`."""
    seen = turn = 0
    while seen < MOST_BATCHES:
        for batch in loader:
            yield turn, batch
            seen += 1
        turn += 1
    logger.warning("EVA: some components still move after %d batches and are taken as they are", seen)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module's own mode after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _to_device(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_to_device(value, device) for value in batch]
    return batch


def _kind(model: nn.Module, path: str) -> type[BaseWeight]:
    base = base_of(model.get_submodule(path))
    assert base is not None
    return base
