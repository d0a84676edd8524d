"""Which modules of a wrapped model are units of their own under FSDP1."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from ..layer import AdaptedLayer, saved_modules
from ..method import AdapterUnit


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """The `auto_wrap_policy` of `FullyShardedDataParallel` for a wrapped model.

    The transformer's blocks are units, and so is each thing that is trained: a unit of FSDP1 has one flat parameter,
    which is either frozen or trained, has one dtype, and in which frozen values would be given gradients.

        FullyShardedDataParallel(model, auto_wrap_policy=pyadapt.distributed.fsdp_auto_wrap_policy(model))
        accelerator.state.fsdp_plugin.auto_wrap_policy = pyadapt.distributed.fsdp_auto_wrap_policy(model)

    Args:
        model: a wrapped model. The classes of its blocks are those that `FSDP_TRANSFORMER_CLS_TO_WRAP` names (accelerate
            sets it from `fsdp_transformer_layer_cls_to_wrap`), else those that transformers says not to split.

    Raises:
        ValueError: the model has no module of a class that is named.
    """
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    named = [name.strip() for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name.strip()]
    wanted = set(named or getattr(model, "_no_split_modules", None) or ())
    classes = {type(module).__name__ for module in model.modules()}
    missing = [name for name in named if name not in classes]
    if missing:
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(missing)}, of which this {type(model).__name__} has no "
            "module"
        )
    trained = {module.copies[name] for _, module in saved_modules(model) for name in module.copies}

    def is_unit(module: Any) -> bool:
        is_trained = module in trained or (isinstance(module, AdapterUnit) and any(True for _ in module.parameters()))
        return is_trained or (type(module).__name__ in wanted and not isinstance(module, AdaptedLayer))

    return functools.partial(lambda_auto_wrap_policy, lambda_fn=is_unit)
