"""LoRA+: the factor B learns at a rate of its own, `loraplus_lr_ratio` times that of A.

With B zero at first and A not, equal rates leave features of wide models underlearnt; a ratio above 1 (the paper: some
16) corrects that. Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024. Which parameter
learns at which rate is as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

LORA_FACTORS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


def loraplus_parameter_groups(
    model: nn.Module,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups for an optimizer, each with its rate and weight decay.

    In this order, less those that would be empty:

        A of linear layers, and modules trained whole       lr
        A and B of embeddings                               loraplus_lr_embedding
        B, and other vectors (the magnitudes of DoRA)       lr * loraplus_lr_ratio
        biases, and the vectors of norms                    lr * loraplus_lr_ratio, no weight decay

    Args:
        model: a model with a LoRA adapter in training.
        lr: the learning rate of A.
        loraplus_lr_ratio: that of B over that of A; should be at least 1.
        loraplus_weight_decay: of all groups but the last.
        loraplus_lr_embedding: the learning rate of both factors on embeddings.

    Raises:
        ValueError: a rate or ratio that is missing or not positive, or a model in which no factor of LoRA is trained.
    """
    _check_positive("lr", lr, "the learning rate of A")
    _check_positive("loraplus_lr_ratio", loraplus_lr_ratio, "the learning rate of B over that of A, say 16")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not any(LORA_FACTORS.intersection(name.split(".")) for name in trained):
        raise ValueError(
            f"LoRA+ found no LoRA factor among the {len(trained)} trained parameters of {type(model).__name__}; "
            "wrap the model with a LoraConfig, or make a LoRA adapter active with set_adapter, before this"
        )
    fast = lr * loraplus_lr_ratio
    groups: dict[str, dict[str, Any]] = {
        "slow": {"lr": lr, "weight_decay": loraplus_weight_decay},
        "embedding": {"lr": loraplus_lr_embedding, "weight_decay": loraplus_weight_decay},
        "fast": {"lr": fast, "weight_decay": loraplus_weight_decay},
        "fast without decay": {"lr": fast, "weight_decay": 0.0},
    }
    for name, parameter in trained.items():
        groups[_group_of(name, parameter, model)].setdefault("params", []).append(parameter)
    # Engines that flatten each group fail on an empty one.
    return [group for group in groups.values() if "params" in group]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., OptimizerT],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> OptimizerT:
    """An optimizer of LoRA+ over the trainable parameters of `model`.

    An optimizer of bitsandbytes keeps the state of trained embeddings in 32 bits.

    Args:
        model: a model with a LoRA adapter in training.
        optimizer_cls: the class of the optimizer, such as `torch.optim.AdamW`.
        lr: see `loraplus_parameter_groups`, as for the next three.
        loraplus_lr_ratio: see there.
        loraplus_weight_decay: see there.
        loraplus_lr_embedding: see there.
        kwargs: what else `optimizer_cls` takes.

    Raises:
        ValueError: as `loraplus_parameter_groups`, or a `weight_decay`, which no group would follow.
    """
    if "weight_decay" in kwargs:
        raise ValueError(
            f"weight_decay={kwargs['weight_decay']!r} would have no effect: each group of LoRA+ has its own; "
            "give loraplus_weight_decay"
        )
    groups = loraplus_parameter_groups(model, lr, loraplus_lr_ratio, loraplus_weight_decay, loraplus_lr_embedding)
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)
    if any(cls.__module__.startswith("bitsandbytes.") for cls in type(optimizer).__mro__):
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _check_positive(name: str, value: Any, meaning: str) -> None:
    if value is None or not value > 0:
        raise ValueError(f"{name}={value!r} is not a positive number; give {meaning}")


def _group_of(name: str, parameter: nn.Parameter, model: nn.Module) -> str:
    path, _, attribute = name.rpartition(".")
    parts = name.split(".")
    if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
        return "embedding"
    # ZeRO-3 keeps a parameter flat, and its shape in `ds_shape`.
    is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) == 1
    if "lora_B" not in parts and not is_vector:
        return "slow"
    in_norm = "norm" in type(model.get_submodule(path)).__name__.lower()
    return "fast without decay" if "bias" in attribute or in_norm else "fast"


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
