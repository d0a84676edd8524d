"""A wrapped model's state dict in checkpoints: training resumes from what training changes, without the base model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..distributed.checkpoints import WithoutBase, is_under_accelerates_fsdp1, meet_engine, saves_without_base
from ..distributed.sharding import sharding_of
from ..trained import MARK, Trained, check_mark, check_trained_state, frozen_names, mark_of
from .state import WithAdapters


class Checkpoints(WithAdapters):
    """State dicts that hold no base model: giving them to engines, and taking them back.

    Attributes:
        pyadapt_checkpoint_without_base: torch looks for what a state dict names (`trained.MARK`).
    """

    pyadapt_checkpoint_without_base: ClassVar[None] = None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.state_dict`; while FSDP has sharded the model, what training changes and no more.

        Every checkpoint of an engine is made of it: Trainer's, accelerate's, and under FSDP2 torch's own.
        """
        given = kwargs.get("destination")
        if given is not None and is_under_accelerates_fsdp1(self):
            from ..distributed.fsdp1_checkpoint import fill_state_dict

            fill_state_dict(self, given, kwargs.get("prefix", ""), kwargs.get("keep_vars", False))
            return given
        if not saves_without_base(self):
            return super().state_dict(*args, **kwargs)
        if given is None:
            kwargs["destination"] = WithoutBase()
            kwargs["destination"]._metadata = WithoutBase()
        found, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        for name in frozen_names(self, found, prefix):
            del found[name]
        found[prefix + MARK] = mark_of(self)
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
        mark = state_dict.pop(prefix + MARK, None)
        given = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        if mark is not None and sharding_of(self) is None:
            check_trained_state(self, given)
        elif mark is not None:
            check_mark(self, mark)
        trained = Trained(self)
        if is_under_accelerates_fsdp1(self):
            from ..distributed.fsdp1_checkpoint import await_optimizer_state

            await_optimizer_state(self)
        self.adapter_state.loads_without_base = prefix if all(name in trained for name in given) else None
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)


def take_state_dicts_without_base(model: nn.Module) -> None:
    """Let `model` count the base as there in a state dict that has nothing at all of it."""
    model.register_load_state_dict_post_hook(_base_is_there)


def need_base_in_state_dicts(model: nn.Module) -> None:
    """Take back `take_state_dicts_without_base`."""
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _base_is_there]:
        del hooks[key]


def _base_is_there(model: Any, incompatible_keys: Any) -> None:
    """Hook behind loading: a base that is absent as a whole was not meant to be there."""
    prefix, model.adapter_state.loads_without_base = model.adapter_state.loads_without_base, None
    if prefix is not None:
        missing = incompatible_keys.missing_keys
        frozen = set(frozen_names(model, missing, prefix))
        missing[:] = [name for name in missing if name not in frozen]
