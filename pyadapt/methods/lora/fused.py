"""LoRA files from before transformers 5 fused the experts of a mixture into one parameter of three dimensions.

Such a file has an A and a B for each expert's own layers. Of E experts, with gate and up of ranks r1 and r3:

    gate_up_proj[e] = [W1[e]; W3[e]]   A = [A1; A3]   B = [[B1, 0], [0, B3]]   rank r1 + r3
    down_proj[e]    = W2[e]            A = A2         B = B2

which is the same function exactly. What was an adapter on a router's linear layer is one on the router's parameter.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...base.experts import Experts
from ...layer import base_modules
from ...layer_config import matches
from ...targets import ALL_LINEAR
from ...targets import matches as is_named
from .config import LoraConfig

logger = logging.getLogger("pyadapt")

# An expert's own layer -> the parameter it is in now, and its position there.
FUSED = {
    "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0),
}  # fmt: skip
# Parameter -> how many layers of each expert it is made of.
PARTS = {"gate_up_proj": 2, "down_proj": 1}

# What modules were called -> what they are called now.
RENAMED = {".block_sparse_moe.": ".mlp."}

_OF_EXPERT = re.compile(r"(.+)\.(\d+)\.(\w+)\.lora_([AB])\.weight")
_OF_ROUTER = re.compile(r"(.+)\.lora_A\.weight")


class Factors(NamedTuple):
    """A (r, in), B (out, r) and s of a layer; of a fused parameter (r E, in), (out, r E) and r is not that of A."""

    A: Tensor
    B: Tensor
    scaling: float


class Adapted(NamedTuple):
    """What a configuration has to say of one parameter."""

    rank: int
    scaling: float


# (expert, position) -> the layer's old path and its tensors, by "A" and "B".
Found = dict[tuple[int, int], dict[str, tuple[str, Tensor]]]


def fuse_experts(
    model: nn.Module, config: Any, tensors: dict[str, Tensor], prefix: str
) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and tensors of a file, for a `model` whose experts are fused.

    Args:
        model: the model that the file is read for.
        config: the file's configuration.
        tensors: the file's tensors by key.
        prefix: what stands before a layer's path in the keys.

    Returns:
        Both as they were where the file has no adapters on single experts, or the model has single experts.

    Raises:
        ValueError: the file lacks some expert, or a layer that is fused with one it has.
    """
    if not isinstance(config, LoraConfig):
        return config, tensors
    modules = dict(base_modules(model))
    experts: dict[str, Found] = defaultdict(lambda: defaultdict(dict))
    adapted: dict[str, Adapted] = {}
    fused: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        old = key.removeprefix(prefix)
        new, layer = _new_name(old), old.rpartition(".lora_")[0]
        expert, router = _OF_EXPERT.fullmatch(new), _OF_ROUTER.fullmatch(new)
        if expert and expert[3] in FUSED and Experts.accepts(modules.get(expert[1])):
            parameter, position = FUSED[expert[3]]
            experts[f"{expert[1]}.{parameter}"][int(expert[2]), position][expert[4]] = (layer, tensor)
        else:
            fused[f"{prefix}{new}"] = tensor
        if router and _is_router(modules.get(router[1])):
            adapted[f"{router[1]}.weight"] = Adapted(len(tensor), config.scaling_of(layer))
    if not experts:
        return config, tensors
    for place, found in experts.items():
        path, _, parameter = place.rpartition(".")
        rows = _rows(config, place, found, Experts.shapes(modules[path])[parameter][0])
        A, B, s = _fuse(rows)
        adapted[place] = Adapted(len(A) // len(rows), s)
        nested = "base_layer." if parameter == "gate_up_proj" and f"{path}.down_proj" in experts else ""
        fused[f"{prefix}{path}.{nested}lora_A.weight"], fused[f"{prefix}{path}.{nested}lora_B.weight"] = A, B
    return _fused_config(config, modules, adapted), fused


def _new_name(path: str) -> str:
    for old, new in RENAMED.items():
        path = path.replace(old, new)
    return path


def _is_router(module: Any) -> bool:
    return Experts.accepts(module) and len(Experts.shapes(module).get("weight", ())) == 2


def _rows(config: LoraConfig, place: str, found: Found, E: int) -> list[list[Factors]]:
    """For each expert its layers, in the order in which they are fused."""
    parameter = place.rpartition(".")[2]
    wanted = [(expert, position) for expert in range(E) for position in range(PARTS[parameter])]
    lacking = [which for which in wanted if found.get(which, {}).keys() != {"A", "B"}]
    if lacking:
        expert, position = lacking[0]
        names = " or ".join(name for name, where in FUSED.items() if where == (parameter, position))
        raise ValueError(
            f"{place} is made of {len(wanted)} layers of single experts; the file has an adapter on "
            f"{len(wanted) - len(lacking)} of them, and none on {names} of expert {expert}"
        )
    layers = [
        Factors(found[which]["A"][1], found[which]["B"][1], config.scaling_of(found[which]["A"][0])) for which in wanted
    ]
    return [layers[start : start + PARTS[parameter]] for start in range(0, len(layers), PARTS[parameter])]


def _fuse(rows: list[list[Factors]]) -> Factors:
    """The factors of the parameter; where scalings differ, the ratio goes into B."""
    s = rows[0][0].scaling
    A = torch.cat([layer.A for row in rows for layer in row])
    # (E, out, r): the layers of an expert on its diagonal.
    blocks = torch.stack(
        [
            torch.block_diag(*[layer.B if layer.scaling == s else layer.scaling / s * layer.B for layer in row])
            for row in rows
        ]
    )
    return Factors(A, blocks.permute(1, 2, 0).flatten(1).contiguous(), s)


def _fused_config(config: LoraConfig, modules: Mapping[str, nn.Module], adapted: Mapping[str, Adapted]) -> LoraConfig:
    """The configuration that means the fused parameters, and of what it meant before what there still is."""
    targets = config.target_modules
    layers = [path for path, module in modules.items() if not Experts.accepts(module)]
    if isinstance(targets, list):
        targets = [name for name in targets if any(is_named([name], path) for path in layers)]
    elif targets is not None and targets.lower() != ALL_LINEAR:
        # An expression may match what is a router's parameter now.
        targets = [path for path in layers if is_named(targets, path)]

    def still_there(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in patterns.items() if any(matches(key, path) for path in modules)}

    alphas = {
        place: scaling * (math.sqrt(rank) if config.use_rslora else rank) for place, (rank, scaling) in adapted.items()
    }
    if config.lora_dropout:
        logger.warning("lora_dropout=%s is left out: it matters to training only, and fused experts cannot have it",
                       config.lora_dropout)  # fmt: skip
    return config.replaced(
        target_modules=targets,
        target_parameters=sorted({*(config.target_parameters or []), *adapted}),
        rank_pattern={re.escape(place): rank for place, (rank, _) in adapted.items()}
        | still_there(config.rank_pattern),
        alpha_pattern={re.escape(place): alpha for place, alpha in alphas.items()} | still_there(config.alpha_pattern),
        lora_dropout=0.0,
    )
