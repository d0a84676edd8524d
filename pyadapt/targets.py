"""Which layers a configuration means."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from .base import base_of
from .base.kind import is_conv1d
from .config import TASK_HEADS, AdapterConfig, TaskType
from .distributed.sharding import whole_shape
from .layer import base_modules

logger = logging.getLogger("pyadapt")

ALL_LINEAR = "all-linear"

# Default targets, and the values of `config.model_type` that they are for. The choices are those of PEFT, so that a
# file which leaves `target_modules` to the library means the same layers in both. Other models are read by structure.
_DEFAULTS: list[tuple[list[str], list[str]]] = [
    (
        ["q_proj", "v_proj"],
        [
            "llama",
            "llama4",
            "mistral",
            "mixtral",
            "gemma",
            "gemma2",
            "gemma3_text",
            "qwen2",
            "qwen3",
            "opt",
            "gptj",
            "gpt_neo",
            "bart",
            "stablelm",
        ],
    ),
    (["query", "value"], ["bert", "roberta", "xlm-roberta", "electra", "layoutlm"]),
    (["query_key_value"], ["bloom", "gpt_neox", "chatglm", "falcon", "RefinedWeb", "RefinedWebModel"]),
    (["q", "v"], ["t5", "mt5"]),
    (["c_attn"], ["gpt2", "gpt_bigcode"]),
    (["q", "v", "q_proj", "v_proj"], ["blip-2"]),
    (["query_proj", "value_proj"], ["deberta-v2"]),
    (["in_proj"], ["deberta"]),
    (["Wqkv"], ["mpt"]),
    (["c_proj", "c_attn"], ["btlm"]),
    (["qkv_proj"], ["codegen"]),
    (["q_proj", "v_proj", "fc1", "fc2"], ["phi"]),
    (["q_proj", "k_proj", "v_proj", "o_proj"], ["nemotron_h"]),
]
DEFAULT_TARGETS = {model_type: targets for targets, model_types in _DEFAULTS for model_type in model_types}

# Heads by name, for models that cannot be asked for their output layer.
HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs")

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_QUERY_OR_VALUE = re.compile(r"(to_)?(q|v|query|value)(_?proj|_lin)?", re.IGNORECASE)


def resolve(config: Any, model: nn.Module) -> tuple[Any, list[str]]:
    """The layers of `model` that `config` adapts.

    Returns:
        A copy of `config` in which `target_modules` and `modules_to_save` say outright what was left to the library,
        and the dotted paths of the layers, in the model's order.

    Raises:
        ValueError: nothing matches (with the nearest names that exist), or a match is no layer that can be adapted.
    """
    config = config.completed(model)
    saved = modules_to_save(config, model)
    holders = parameter_holders(config, saved, model)
    wanted = config.target_modules
    if wanted is None:
        # Whoever names parameters means those alone.
        wanted = [] if holders else default_targets(model, config.default_targets)
    elif isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        wanted = sorted(all_linear(model))
    matched = [path for path, _ in base_modules(model) if path and matches(wanted, path)]
    if isinstance(wanted, list):
        _check_each_target_exists(wanted, matched, model)
    kept = [path for path in matched if _is_kept(config, saved, path)]
    _check_kinds(kept, model)
    _check_not_in_both(kept, holders)
    chosen = [path for path, _ in base_modules(model) if path in {*kept, *holders}]
    if not chosen:
        raise ValueError(_nothing_matches(config, wanted, matched, model))
    # PEFT's files say it of a model with Conv1D layers, whatever the user's configuration said.
    transposed = any(is_conv1d(model.get_submodule(path)) for path in chosen)
    resolved = config.replaced(target_modules=wanted, modules_to_save=saved or None, fan_in_fan_out=transposed)
    return resolved, chosen


def targeted_parameters(config: Any, path: str, module: nn.Module) -> list[str]:
    """Names of the parameters of `module` itself that `config.target_parameters` means, in the module's order."""
    wanted = getattr(config, "target_parameters", None)
    if not wanted or not path:
        return []
    return [name for name, _ in module.named_parameters(recurse=False) if matches(wanted, f"{path}.{name}")]


def adapted_places(config: Any, path: str, module: nn.Module) -> list[str]:
    """What rank and scaling are looked up for on the adapted module at `path`: itself, or its adapted parameters."""
    base = base_of(module)
    names = targeted_parameters(config, path, module) if base is not None and base.form == "experts" else []
    return [f"{path}.{name}" for name in names] or [path]


def parameter_holders(config: Any, saved: list[str], model: nn.Module) -> list[str]:
    """Paths of the modules whose own parameters `config.target_parameters` means.

    As in PEFT, neither `exclude_modules` nor `layers_to_transform` counts.

    Raises:
        ValueError: nothing matches (with the nearest names that exist), or a match cannot be adapted.
    """
    wanted = getattr(config, "target_parameters", None)
    if not wanted:
        return []
    if isinstance(wanted, str):
        raise ValueError(f"target_parameters={wanted!r} is one string; a list of names is needed: [{wanted!r}]")
    named = {path: module for path, module in base_modules(model) if path}
    found = {path: names for path, module in named.items() if (names := targeted_parameters(config, path, module))}
    every = [f"{path}.{name}" for path, module in named.items() for name, _ in module.named_parameters(recurse=False)]
    matched = [f"{path}.{name}" for path, names in found.items() for name in names]
    missing = [name for name in wanted if not any(_ends_with(parameter, name) for parameter in matched)]
    if len(missing) == len(wanted):
        raise ValueError("target_parameters: " + "; ".join(_no_such_parameter(name, every) for name in missing))
    if missing:
        logger.warning("target_parameters not in this model: %s", ", ".join(missing))
    for path, names in found.items():
        _check_parameters(path, names, named[path])
    return [path for path in found if not _is_saved(saved, path)]


def modules_to_save(config: AdapterConfig, model: nn.Module) -> list[str]:
    """What is trained whole: what the configuration names, and the head that its task trains from scratch.

    Raises:
        ValueError: a name of the configuration is not in the model.
    """
    named = list(getattr(config, "modules_to_save", None) or [])
    heads = TASK_HEADS.get(config.task_type, ()) if isinstance(config.task_type, TaskType) else ()
    paths = [path for path, _ in base_modules(model) if path]
    for name in named:
        # PEFT writes both names of the usual heads into each file; a model has one of them.
        if name not in heads and not any(_ends_with(path, name) for path in paths):
            raise ValueError(f"modules_to_save: {_no_such(name, paths)}")
    named += [head for head in heads if head not in named]
    # A layer in front of a head (DistilBERT's pre_classifier) is as new as that; PEFT, which matches ends of names,
    # trains and writes it too.
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    named += [leaf for leaf in leaves if leaf not in named and leaf.endswith(heads)]
    return [name for name in named if any(_ends_with(path, name) for path in paths)]


def paths_to_save(names: Iterable[str], model: nn.Module) -> list[str]:
    """Paths of the modules that `names` mean, outermost only."""
    found = [path for path, _ in base_modules(model) if path and any(_ends_with(path, name) for name in names)]
    return [path for path in found if not any(path.startswith(outer + ".") for outer in found)]


def matches(wanted: str | list[str], path: str) -> bool:
    """A list matches by dotted suffix, a string as a regular expression of the whole path."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(_ends_with(path, name) for name in wanted)


def all_linear(model: nn.Module) -> list[str]:
    """Every linear layer but the output head."""
    heads = output_heads(model)
    return [path for path, layer in base_modules(model) if path and is_linear(layer) and path not in heads]


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer` multiplies its input by a matrix, however that is stored."""
    base = base_of(layer)
    return base is not None and base.form == "linear"


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the layers that make the model's output: never adapted or quantised unless named."""
    heads = set()
    ask: Any = getattr(model, "get_output_embeddings", None)
    output = ask() if ask is not None else None
    for path, module in base_modules(model):
        if module is output or (path.split(".")[0] in HEAD_NAMES and is_linear(module)):
            heads.add(path)
    return heads


def default_targets(model: nn.Module, own: Mapping[str, list[str]] = MappingProxyType({})) -> list[str]:
    """What is adapted when the configuration does not say: by the model's type, else by its structure.

    Args:
        model: the model.
        own: a method's own table, model type -> targets, which comes before the usual one.
    """
    known = {**DEFAULT_TARGETS, **own}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in known:
        return list(known[model_type])
    attention = [path for path in all_linear(model) if any(_ATTENTION.search(part) for part in path.split(".")[:-1])]
    names = sorted({path.rpartition(".")[2] for path in attention})
    chosen = [name for name in names if _QUERY_OR_VALUE.fullmatch(name)] or names
    if not chosen:
        raise ValueError(
            f"no default targets for {type(model).__name__}: it has no linear layer inside an attention module; "
            'name the layers in target_modules, or take them all with target_modules="all-linear"'
        )
    logger.warning(
        "target_modules not given and %s is in no table: chose %s by structure", type(model).__name__, chosen
    )
    return chosen


def _is_kept(config: Any, saved: list[str], path: str) -> bool:
    excluded = getattr(config, "exclude_modules", None)
    if excluded and matches(excluded, path):
        return False
    return not _is_saved(saved, path) and _is_in_wanted_block(config, path)


def _is_saved(saved: list[str], path: str) -> bool:
    """Whether `path` is, or lies in, a module that is trained whole and so not adapted as well."""
    return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in saved)


def _is_in_wanted_block(config: Any, path: str) -> bool:
    indices = getattr(config, "layers_to_transform", None)
    if indices is None or indices == []:
        return True
    pattern = config.layers_pattern or r"[^.]*"
    lists = [pattern] if isinstance(pattern, str) else pattern
    # The first number in the path is the block; a later one counts something inside it, such as an expert.
    found = [match for name in lists if (match := re.match(rf"(?:.*?\.)?{name}\.(\d+)\.", path))]
    wanted = [indices] if isinstance(indices, int) else indices
    return bool(found) and int(found[0].group(1)) in wanted


def _check_kinds(paths: list[str], model: nn.Module) -> None:
    for path in paths:
        layer = model.get_submodule(path)
        base = base_of(layer)
        if base is not None and base.form == "experts":
            parameters = [f"{path.rpartition('.')[2]}.{name}" for name in base.stored(layer)]
            raise ValueError(
                f"target {path!r} is a {type(layer).__name__}, which keeps its parameters itself; name them in "
                f"target_parameters={parameters}"
            )
        if base is None:
            inside = [f"{path}.{name}" for name, inner in layer.named_modules() if name and is_linear(inner)]
            hint = f"; linear layers inside it: {', '.join(inside[:4])}" if inside else ""
            raise ValueError(f"target {path!r} is a {type(layer).__name__}, which no adapter can be put on{hint}")


def _check_parameters(path: str, names: list[str], module: nn.Module) -> None:
    """Refuse parameters that no unit adapts."""
    base = base_of(module)
    adaptable: list[str] = []
    if base is not None and base.form == "experts":
        adaptable = list(base.stored(module))
    elif base is not None and base.form == "linear" and not is_conv1d(module):
        # The same as an adapter on the layer, and the same file.
        adaptable = ["weight"]
    for name in names:
        if name not in adaptable:
            shape = whole_shape(module.get_parameter(name))
            remedy = f"name the layer, {path!r}, in target_modules" if base is not None else "leave it out"
            raise ValueError(
                f"target_parameters: {path}.{name}, of shape {shape} in a {type(module).__name__}, cannot be adapted "
                "as a parameter; that takes a floating one of two or three dimensions that is no other kind's weight: "
                f"{remedy}"
            )


def _check_not_in_both(modules: list[str], holders: list[str]) -> None:
    both = [path for path in holders if path in modules]
    if both:
        raise ValueError(f"{both[0]!r} is named in target_modules, and its weight in target_parameters: leave one out")


def _check_each_target_exists(wanted: list[str], matched: list[str], model: nn.Module) -> None:
    missing = [name for name in wanted if not any(_ends_with(path, name) for path in matched)]
    # As in PEFT, a list may name layers of several architectures, as long as one is there.
    if wanted and len(missing) == len(wanted):
        paths = [path for path, _ in base_modules(model) if path]
        raise ValueError("target_modules: " + "; ".join(_no_such(name, paths) for name in missing))
    if missing:
        logger.warning("target_modules not in this model: %s", ", ".join(missing))


def _nothing_matches(config: Any, wanted: str | list[str], matched: list[str], model: nn.Module) -> str:
    if matched:
        return (
            f"target_modules={wanted!r} matches {len(matched)} layers ({matched[0]}, ...), but exclude_modules, "
            "layers_to_transform or modules_to_save leaves none of them"
        )
    examples = ", ".join(all_linear(model)[:6])
    return f"target_modules={wanted!r} matches no module; linear layers of this model: {examples or 'none'}"


def _no_such(name: str, paths: list[str]) -> str:
    """A sentence with the nearest names that exist."""
    leaves = sorted({path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()})
    near = difflib.get_close_matches(name.rpartition(".")[2], leaves, n=3, cutoff=0.4)
    return f"no module is named {name!r}; the nearest are {', '.join(near or leaves[:6])}"


def _no_such_parameter(name: str, every: list[str]) -> str:
    parts = name.count(".") + 1
    ends = sorted({".".join(path.split(".")[-parts:]) for path in every})
    near = difflib.get_close_matches(name, ends, n=3, cutoff=0.4)
    return f"no parameter is named {name!r}; the nearest are {', '.join(near or ends[:6])}"


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)
