"""Give a live module another class, and take it back.

An adapted layer is the user's own object: its parameters, its place in the model and its
state-dict keys stay, and only its ``__class__`` becomes a subclass `(Mixin, OriginalClass)` that keeps the
original name. FSDP2's ``fully_shard`` changes modules in this way too.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, TypeVar, cast

from torch import nn

# One class for each (mixin, class), never one for each instance: torch.compile guards on the class, so a
# class an instance would make it compile every layer again.
_classes: dict[tuple[type, type], type] = {}


MixinT = TypeVar("MixinT", bound=nn.Module)


def adopt(module: nn.Module, mixin: type[MixinT]) -> MixinT:
    """Put `mixin` in front of the class of `module`, in place; the same object is returned under its new type.

    Raises:
        RuntimeError: the instance has a ``forward`` of its own, which would hide the mixin's.
    """
    if "forward" in mixin.__dict__:
        _check_forward_can_be_replaced(module)
    module.__class__ = _dynamic_class(mixin, type(module))
    _rebind_hooked_forward(module)
    return cast(MixinT, module)


def release(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Take `mixin`, or the mixin derived from it that was put on, off again; others before or after it stay.

    Raises:
        RuntimeError: the module does not carry it, or something else has changed its class since.
    """
    root, mixins = _root_and_mixins(type(module))
    if not any(issubclass(put_on, mixin) for put_on in mixins):
        raise RuntimeError(
            f"{type(module).__name__} cannot be taken back: its class was changed after {mixin.__name__} was put on "
            "(sharded by fully_shard?)"
        )
    cls = root
    for kept in mixins:
        if not issubclass(kept, mixin):
            cls = _dynamic_class(kept, cls)
    module.__class__ = cls
    _rebind_hooked_forward(module)


def make_plain(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give `module`, whose attributes fit it by now, the class `cls` for good."""
    module.__class__ = cls
    _rebind_hooked_forward(module)


def make_under(module: nn.Module, cls: type[nn.Module], mixin: type[nn.Module]) -> None:
    """Give `module`, whose attributes fit it by now, the class `cls` with `mixin` on it, under what else was put on."""
    _, mixins = _root_and_mixins(type(module))
    made = cls
    for put_on in (mixin, *mixins):
        made = _dynamic_class(put_on, made)
    module.__class__ = made
    _rebind_hooked_forward(module)


def is_adopted_by(module: nn.Module, mixin: type[nn.Module]) -> bool:
    """Whether `adopt` put `mixin` on `module`, whatever was put on it since."""
    return isinstance(module, mixin)


def original_class(module: nn.Module) -> type:
    """The class that `module` had before any `adopt`."""
    return original_of(type(module))


def original_of(cls: type) -> type:
    """The class that `adopt` has made `cls` of; `cls` itself where it has not."""
    return _root_and_mixins(cls)[0]


def forward_arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of the forward that `module` had before any `adopt`."""
    cls: Any = original_class(module)
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def check_adoptable(path: str, module: nn.Module) -> None:
    """Raise the error that `adopt` would raise, naming the module by its path."""
    try:
        _check_forward_can_be_replaced(module)
    except RuntimeError as error:
        raise RuntimeError(f"{path}: {error}") from None


def _dynamic_class(mixin: type, original: type) -> type:
    key = (mixin, original)
    if key not in _classes:
        namespace = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": _reduce_ex,
            "_pyadapt_mixin": mixin,
            "_pyadapt_original": original,
        }
        _classes[key] = type(original.__name__, (mixin, original), namespace)
    return _classes[key]


def _root_and_mixins(cls: type) -> tuple[type, tuple[type, ...]]:
    mixins: list[type] = []
    while "_pyadapt_mixin" in cls.__dict__:
        mixins.append(cls.__dict__["_pyadapt_mixin"])
        cls = cls.__dict__["_pyadapt_original"]
    return cls, tuple(reversed(mixins))


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle and deepcopy by the importable parts of the class: a dynamic class has no name to import."""
    root, mixins = _root_and_mixins(type(self))
    # object.__getstate__ exists from Python 3.11 on.
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _new_instance, (root, mixins), state


def _new_instance(root: type, mixins: tuple[type, ...]) -> Any:
    cls: Any = root
    for mixin in mixins:
        cls = _dynamic_class(mixin, cls)
    return cls.__new__(cls)


def _check_forward_can_be_replaced(module: nn.Module) -> None:
    own = module.__dict__.get("forward")
    if own is None or "_old_forward" in module.__dict__ or _is_class_forward(module, own):
        return
    raise RuntimeError(
        f"this {type(module).__name__} has a `forward` of its own set on the instance ({own!r}), which would hide "
        "the adapter's: set it on a subclass instead, or wrap before patching"
    )


def _rebind_hooked_forward(module: nn.Module) -> None:
    """Point instance-level copies of ``forward`` at the new class.

    accelerate keeps the forward it hooked as ``_old_forward``; bound to the old class it would skip the adapter.
    """
    for name in ("_old_forward", "forward"):
        held = module.__dict__.get(name)
        if held is not None and _is_class_forward(module, held):
            module.__dict__[name] = types.MethodType(type(module).forward, module)


def _is_class_forward(module: nn.Module, held: Any) -> bool:
    """Whether `held` is the bound `forward` of some class, rather than a function written for this instance."""
    return isinstance(held, types.MethodType) and held.__self__ is module and held.__func__.__name__ == "forward"
