"""Adding, choosing, changing and removing the adapters of a wrapped model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from .. import attach, checkpoint
from ..config import AdapterConfig, as_config
from ..distributed.sharding import engine_of
from ..files import Path
from ..merging import refuse_sharded
from ..planning import prepare
from ..resuming import fill_training_state, read_training_state
from . import hotswapping, scaling, weighting
from .arguments import check_only
from .merges import MergeVerbs


class AdapterNames(list[str]):
    """The names of the active adapters: a list, as in PEFT, that can be called, as in transformers."""

    def __call__(self) -> list[str]:
        """The same names as a plain list."""
        return list(self)


class AdapterVerbs(MergeVerbs):
    """What can be done with the adapters."""

    def add_adapter(self, *args: Any, data: Any = None, **kwargs: Any) -> None:
        """Add a fresh adapter: `add_adapter(name, config)` as in PEFT, or `(config, name)` as in transformers.

        It becomes active only where there was none. `data` as in `pyadapt.wrap`.
        """
        config, name = _config_and_name(*args, **kwargs)
        attach.check_adapter_name(name, list(self.peft_config))
        self.check_not_merged("add an adapter")
        start = prepare(self, as_config(config), data)
        self.add_planned(start.plan, name, trainable=True)
        attach.fill(self, name, start.values)
        start.finish()

    def load_adapter(
        self,
        path: Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        strict: bool = True,
        adapter_dtype: Any = None,
        low_cpu_mem_usage: bool = False,
        **hub: Any,
    ) -> None:
        """Add the adapter that lies in the folder, hub repository or file `path`; see `pyadapt.load`.

        Raises:
            AdapterFileError: the files are missing, damaged or do not fit; the model is unchanged.
        """
        attach.check_adapter_name(adapter_name, list(self.peft_config))
        read = checkpoint.read_adapter(self, path, strict=strict, adapter_dtype=adapter_dtype, **hub)
        wholes = read.wholes(self, units=low_cpu_mem_usage)
        state = read_training_state(read.folder) if is_trainable else {}
        self.add_planned(read.plan, adapter_name, trainable=is_trainable, values=wholes)
        try:
            checkpoint.fill_adapter(self, adapter_name, read.besides(wholes))
            fill_training_state(self, adapter_name, state)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter active, or several whose terms are summed; the others stop training.

        Raises:
            ValueError: an unknown name.
            RuntimeError: adapters are merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.check_names(names)
        self.check_not_merged("switch adapters")
        attach.check_together(self, names)
        self.adapter_state.active = names
        self.refresh()

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, **how: Any
    ) -> None:
        """Add an adapter that is a weighted combination of others; it is not active.

        Args:
            adapters: names of the adapters to combine.
            weights: a number for each; negative ones subtract.
            adapter_name: what the new adapter is called.
            how: for LoRA `combination_type` and its options, see `pyadapt.methods.lora.combining.Combination`.

        Raises:
            ValueError: a name is unknown or taken, or the options do not fit the adapters; the model is unchanged.
            RuntimeError: adapters are merged.
        """
        self.check_names(adapters)
        attach.check_adapter_name(adapter_name, list(self.peft_config))
        self.check_not_merged("combine adapters")
        weighting.add_weighted(self, adapter_name, adapters, weights, **how)

    def rename_adapter(self, old: str, new: str) -> None:
        """Call the adapter `old` `new`; whether it is active, and its place among the others, stay.

        Raises:
            ValueError: `old` is not there, or `new` is taken or no name.
            RuntimeError: adapters are merged.
        """
        self.check_names([old])
        self.check_not_merged("rename an adapter")
        attach.check_adapter_name(new, list(self.peft_config))
        attach.rename(self, old, new)
        self.peft_config = {(new if name == old else name): config for name, config in self.peft_config.items()}
        self.adapter_state.active = [new if name == old else name for name in self.adapter_state.active]

    def hotswap_adapter(self, path: Path, adapter_name: str = "default", strict: bool = True, **hub: Any) -> bool:
        """Give an adapter the weights of the one in the folder (or hub repository) `path`.

        Compiled code stays valid where the new weights fit into the old shapes, with no higher rank.

        Returns:
            Whether they fitted; if not, the adapter was loaded anew under its name.

        Raises:
            AdapterFileError: the files are missing, damaged or do not fit; the model is unchanged.
            ValueError: an unknown name.
            RuntimeError: adapters are merged.
        """
        self.check_names([adapter_name])
        self.check_not_merged("swap an adapter")
        return hotswapping.hotswap(self, adapter_name, path, strict, **hub)

    def pad_ranks(self, rank: int) -> None:
        """Raise the rank of each adapter to `rank` with zeros, so that adapters of up to that rank can be swapped in.

        The adapters' outputs and scalings stay; call it before compiling.

        Raises:
            ValueError: an adapter has no rank, or a higher one.
            RuntimeError: adapters are merged.
        """
        self.check_not_merged("pad adapters")
        hotswapping.pad_ranks(self, rank)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters, or stop training them, whether they are active or not.

        `set_adapter` decides it anew.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_names(names)
        for name in names:
            attach.set_trainable(self, name, requires_grad)

    @contextlib.contextmanager
    def rescaled(self, factor: float, adapter_names: str | Sequence[str] | None = None) -> Iterator[None]:
        """Inside the block adapters (by default all) add `factor` times what they would.

        Raises:
            TypeError: `factor` is no number.
            ValueError: an unknown name, or a method without a scaling.
            RuntimeError: adapters are merged.
        """
        self.check_not_merged("rescale adapters")
        before = scaling.scalings(self, self.names_or_all(adapter_names))
        self.rescale(factor, adapter_names)
        try:
            yield
        finally:
            scaling.set_scalings(before)

    def rescale(self, factor: float, adapter_names: str | Sequence[str] | None = None) -> None:
        """Let adapters (by default all) add `factor` times what they did, for as long as they are in memory.

        The configuration, and so the files, keep the old scaling. Raises as `rescaled` does.
        """
        self.check_not_merged("rescale adapters")
        scaling.rescale(self, self.names_or_all(adapter_names), factor)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Let an adapter add `scale` times what its configuration says. Raises as `rescaled` does."""
        self.check_names([adapter_name])
        self.check_not_merged("rescale adapters")
        scaling.set_scale(self, adapter_name, scale)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove adapters and free their weights.

        Raises:
            RuntimeError: adapters are merged, or an engine that shards it has the model in hand.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.check_names(names)
        self.check_not_merged("delete an adapter")
        if engine_of(self) is not None:
            refuse_sharded(self, "delete an adapter")
        for name in names:
            attach.detach(self, name)
            del self.peft_config[name]
        state = self.adapter_state
        state.active = [name for name in state.active if name not in names] or list(self.peft_config)[:1]
        self.refresh()

    @property
    def active_adapters(self) -> AdapterNames:
        """Names of the active adapters; also `active_adapters()`, as transformers spells it."""
        return AdapterNames(self.adapter_state.active)

    @property
    def active_adapter(self) -> str:
        """Name of the first active adapter."""
        if not self.adapter_state.active:
            raise ValueError("the model has no adapter any more; add_adapter or load_adapter gives it one")
        return self.adapter_state.active[0]

    @property
    def active_peft_config(self) -> AdapterConfig:
        """Configuration of the first active adapter."""
        return self.peft_config[self.active_adapter]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model is the base model; merged weights are taken out for its duration."""
        merged, was_enabled = self.adapter_state.merged, self.adapter_state.enabled
        if merged:
            self.unmerge_adapter()
        self.disable_adapters()
        try:
            yield
        finally:
            self.adapter_state.enabled = was_enabled
            self.refresh()
            if merged:
                self.merge_adapter(merged)

    def disable_adapters(self) -> None:
        """Let the base model answer until `enable_adapters`."""
        self.check_not_merged("disable adapters", remedy="unmerge_adapter() first, or use `with disable_adapter()`")
        self.adapter_state.enabled = False
        self.refresh()

    def enable_adapters(self) -> None:
        """Undo `disable_adapters`."""
        self.adapter_state.enabled = True
        self.refresh()


def _config_and_name(*args: Any, **kwargs: Any) -> tuple[Any, str]:
    """Sort out the argument orders of PEFT and transformers."""
    check_only(kwargs, "adapter_name", "peft_config", "adapter_config", "config")
    values = [*args, *kwargs.values()]
    names = [value for value in values if isinstance(value, str)]
    configs = [value for value in values if value is not None and not isinstance(value, str)]
    if len(configs) != 1 or len(names) > 1:
        raise TypeError("add_adapter takes one configuration and one name, in either order")
    return configs[0], names[0] if names else "default"
