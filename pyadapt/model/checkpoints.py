"""A wrapped model's state dict in checkpoints: training resumes from what training changes, without the base model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..distributed.checkpoints import WithoutBase, meet_engine, saves_without_base
from ..trained import MARK, Trained, check_trained_state, without_wrappers
from .state import WithAdapters


class Checkpoints(WithAdapters):
    """State dicts that hold no base model: giving them to engines, and taking them back."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.state_dict`; while FSDP2 has sharded the model, what training changes and no more.

        Every checkpoint of an engine is made of it: Trainer's, accelerate's, torch's own.
        """
        if not saves_without_base(self):
            return super().state_dict(*args, **kwargs)
        if kwargs.get("destination") is None:
            kwargs["destination"] = WithoutBase()
            kwargs["destination"]._metadata = WithoutBase()
        found, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        trained = Trained(self)
        for name in [name for name in found if name.startswith(prefix) and name[len(prefix) :] not in trained]:
            del found[name]
        return found

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> Any:
        """As `torch.nn.Module.register_forward_pre_hook`; an engine comes to know here that its model is wrapped."""
        meet_engine(hook)
        return super().register_forward_pre_hook(hook, **options)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        """nn.Module calls this before the first value is copied.

        Raises:
            AdapterFileError: the file of a checkpoint fits another model.
        """
        if state_dict.pop(prefix + MARK, None) is not None:
            given = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
            check_trained_state(self, given)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)


def take_state_dicts_without_base(model: nn.Module) -> None:
    """Let `model` count the base as there in a state dict that has nothing at all of it."""
    model.register_load_state_dict_post_hook(_base_is_there)


def need_base_in_state_dicts(model: nn.Module) -> None:
    """Take back `take_state_dicts_without_base`."""
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _base_is_there]:
        del hooks[key]


def _base_is_there(model: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    if not missing:
        return
    trained = Trained(model)
    frozen = [name for name in nn.Module.state_dict(model, keep_vars=True) if name not in trained]
    frozen = [without_wrappers(name) for name in frozen]
    by_name = {without_wrappers(name): name for name in missing}
    # A wrapper, such as DDP, has put its own name before those of the model.
    first = frozen[0] if frozen else None
    starts = [name.removesuffix(first) for name in by_name if first is not None and name.endswith(first)]
    for start in starts:
        names = [start + name for name in frozen]
        if all(name in by_name for name in names):
            absent = {by_name[name] for name in names}
            missing[:] = [name for name in missing if name not in absent]
