"""What a wrapped model can do more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

from torch import Tensor, nn

from . import attach, checkpoint, hotswapping, merging, mixing, scaling, status, weighting
from .biases import is_bias_copy
from .config import AdapterConfig, as_config
from .files import Path
from .integrations.transformers import forget_quantization, is_transformers_model
from .layer import saved_modules
from .planning import Plan, count_base_parameters, count_values, prepare
from .surgery import adopt, is_adopted_by, release
from .tokens import check_together


@dataclass
class AdapterState:
    """Which adapters of a model are at work.

    Attributes:
        active: names of the active adapters, in order.
        enabled: False while adapters are disabled.
        merged: names of the adapters that are folded into the base weights.
        trained_before: names of the base parameters that required gradients before wrapping.
    """

    active: list[str] = field(default_factory=list)
    enabled: bool = True
    merged: tuple[str, ...] = ()
    trained_before: frozenset[str] = frozenset()


class AdapterNames(list[str]):
    """The names of the active adapters: a list, as in PEFT, that can be called, as in transformers."""

    def __call__(self) -> list[str]:
        """The same names as a plain list."""
        return list(self)


class AdaptedModel(nn.Module):
    """Mixin of a wrapped model. The object, its class name and its state-dict keys stay those of the user's model.

    Attributes:
        peft_config: adapter name -> configuration, everything said outright.
        adapter_state: which adapters are at work.
    """

    peft_config: dict[str, AdapterConfig]
    adapter_state: AdapterState
    # transformers asks this before it writes a whole model or refuses to train a quantised one.
    _hf_peft_config_loaded: bool

    # --- adapters ---------------------------------------------------------------------------------

    def add_adapter(self, *args: Any, data: Any = None, **kwargs: Any) -> None:
        """Add a fresh adapter: `add_adapter(name, config)` as in PEFT, or `(config, name)` as in transformers.

        It becomes active only where there was none. `data` as in `pyadapt.wrap`.
        """
        config, name = _config_and_name(*args, **kwargs)
        attach.check_adapter_name(name, list(self.peft_config))
        self._check_not_merged("add an adapter")
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
        """Add the adapter that lies in the folder (or hub repository) `path`; see `pyadapt.load`.

        Raises:
            AdapterFileError: the files are missing, damaged or do not fit; the model is unchanged.
        """
        attach.check_adapter_name(adapter_name, list(self.peft_config))
        read = checkpoint.read_adapter(self, path, strict=strict, adapter_dtype=adapter_dtype, **hub)
        wholes = read.wholes(self, units=low_cpu_mem_usage)
        self.add_planned(read.plan, adapter_name, trainable=is_trainable, values=wholes)
        try:
            checkpoint.fill_adapter(self, adapter_name, read.besides(wholes))
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
        self._check_names(names)
        self._check_not_merged("switch adapters")
        check_together(self, names)
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
        self._check_names(adapters)
        attach.check_adapter_name(adapter_name, list(self.peft_config))
        self._check_not_merged("combine adapters")
        weighting.add_weighted(self, adapter_name, adapters, weights, **how)

    def rename_adapter(self, old: str, new: str) -> None:
        """Call the adapter `old` `new`; whether it is active, and its place among the others, stay.

        Raises:
            ValueError: `old` is not there, or `new` is taken or no name.
            RuntimeError: adapters are merged.
        """
        self._check_names([old])
        self._check_not_merged("rename an adapter")
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
        self._check_names([adapter_name])
        self._check_not_merged("swap an adapter")
        return hotswapping.hotswap(self, adapter_name, path, strict, **hub)

    def pad_ranks(self, rank: int) -> None:
        """Raise the rank of each adapter to `rank` with zeros, so that adapters of up to that rank can be swapped in.

        The adapters' outputs and scalings stay; call it before compiling.

        Raises:
            ValueError: an adapter has no rank, or a higher one.
            RuntimeError: adapters are merged.
        """
        self._check_not_merged("pad adapters")
        hotswapping.pad_ranks(self, rank)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters, or stop training them, whether they are active or not.

        `set_adapter` decides it anew.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
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
        self._check_not_merged("rescale adapters")
        before = scaling.scalings(self, self._names_or_all(adapter_names))
        self.rescale(factor, adapter_names)
        try:
            yield
        finally:
            scaling.set_scalings(before)

    def rescale(self, factor: float, adapter_names: str | Sequence[str] | None = None) -> None:
        """Let adapters (by default all) add `factor` times what they did, for as long as they are in memory.

        The configuration, and so the files, keep the old scaling. Raises as `rescaled` does.
        """
        self._check_not_merged("rescale adapters")
        scaling.rescale(self, self._names_or_all(adapter_names), factor)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Let an adapter add `scale` times what its configuration says. Raises as `rescaled` does."""
        self._check_names([adapter_name])
        self._check_not_merged("rescale adapters")
        scaling.set_scale(self, adapter_name, scale)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove adapters and free their weights."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        self._check_not_merged("delete an adapter")
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
        self._check_not_merged("disable adapters", remedy="unmerge_adapter() first, or use `with disable_adapter()`")
        self.adapter_state.enabled = False
        self.refresh()

    def enable_adapters(self) -> None:
        """Undo `disable_adapters`."""
        self.adapter_state.enabled = True
        self.refresh()

    # --- merging ----------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters (by default the active ones) into the weights in place.

        The old weights are kept beside the merged ones, so that `unmerge_adapter` can put them back exactly. An int8
        weight is quantised again.

        Raises:
            RuntimeError: adapters are merged already.
            ValueError: an unknown name, or a merged weight would not be finite; the model is unchanged.
        """
        names = tuple(self.adapter_state.active if adapter_names is None else adapter_names)
        self._check_names(names)
        self._check_not_merged("merge again")
        check_together(self, names)
        merging.merge_in_place(self, names)
        self.adapter_state.merged = names
        self.refresh()

    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the weights again, bit for bit.

        Raises:
            RuntimeError: nothing is merged.
        """
        if not self.adapter_state.merged:
            raise RuntimeError("no adapter is merged, so there is nothing to unmerge")
        merging.unmerge_in_place(self)
        self.adapter_state.merged = ()
        self.refresh()

    def merge_and_unload(
        self, adapter_names: Sequence[str] | None = None, original: Path | None = None, **unused: Any
    ) -> nn.Module:
        """Fold adapters (by default the active ones) in and give back the plain model, the same object.

        Layers over int8 become dense. The report of sources and errors is left in `model.merge_report`.

        Args:
            adapter_names: the adapters to fold in.
            original: checkpoint of the model from before it was quantised, to merge into instead of dequantised
                weights.
            unused: `safe_merge` and `progressbar` of PEFT; every merge here is a safe one.
        """
        _check_only(unused, "safe_merge", "progressbar")
        names = tuple(self.adapter_state.active if adapter_names is None else adapter_names)
        self._check_names(names)
        check_together(self, names)
        if self.adapter_state.merged:
            self.unmerge_adapter()
        report = merging.merge_to_plain(self, names, original)
        model = self.unload()
        if is_transformers_model(model):
            forget_quantization(model)
        cast(Any, model).merge_report = report
        return model

    def unload(self) -> nn.Module:
        """Remove every adapter and give back the base model: the same object, its original class."""
        if self.adapter_state.merged:
            self.unmerge_adapter()
        for name in list(self.peft_config):
            attach.detach(self, name)
        for name, parameter in self.named_parameters():
            # LoftQ may have made a weight int8 since.
            if name in self.adapter_state.trained_before and parameter.is_floating_point():
                parameter.requires_grad_(True)
        release(self, AdaptedGenerator if isinstance(self, AdaptedGenerator) else AdaptedModel)
        forget_adapters(self)
        return self

    def get_base_model(self) -> nn.Module:
        """The user's model, which a wrapped model still is."""
        return self

    # --- files ------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: Path,
        selected_adapters: Sequence[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        as_plain_lora: bool = False,
        path_initial_model_for_weight_conversion: Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters (all, or the selected ones) as PEFT does: a few megabytes, never the base model.

        Args:
            save_directory: "default" goes here, any other adapter into a folder of its name below.
            selected_adapters: names of the adapters to write.
            state_dict: the whole model's state dict where an engine has gathered it.
            is_main_process: other processes write nothing.
            push_to_hub: upload the folder afterwards; `repo_id`, `token`, `private`, `commit_message` are passed on.
            as_plain_lora: write an adapter that started from its layers' weights (PiSSA, OLoRA) as a plain LoRA of
                twice the rank, for which nothing is factored when it is loaded.
            path_initial_model_for_weight_conversion: PEFT's way to ask for the same. The adapter's start is known here,
                so nothing is read from this folder.
            kwargs: further options of transformers' and PEFT's `save_pretrained`, which mean nothing for adapters here.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._check_names(names)
        if os.path.isfile(save_directory):
            raise ValueError(f"{os.fspath(save_directory)} is a file; a folder is needed")
        plain = as_plain_lora or path_initial_model_for_weight_conversion is not None
        if is_main_process:
            for name in names:
                checkpoint.save_adapter(self, save_directory, name, self.peft_config[name], state_dict, plain)
            if push_to_hub:
                hub = {key: kwargs[key] for key in ("token", "private", "commit_message") if key in kwargs}
                _upload(
                    save_directory,
                    kwargs.get("repo_id") or os.path.basename(os.path.abspath(save_directory)),
                    **hub,
                )

    def push_to_hub(self, repo_id: str, **hub: Any) -> None:
        """Upload the adapters to the hub repository `repo_id` (`token`, `private`, `commit_message`)."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            _upload(folder, repo_id, **hub)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One adapter's tensors under their keys in a file, without the leading `base_model.model.`."""
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_names([name])
        tensors = checkpoint.adapter_state_dict(self, name, state_dict)
        return {key.removeprefix(checkpoint.KEY_PREFIX): tensor for key, tensor in tensors.items()}

    # --- reports ---------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained values, all values); each value of the base counts once, also where a copy of it is trained."""
        units = {id(p): p for name in self.peft_config for p in attach.adapter_parameters(self, name)}
        copies = {id(p) for _, module in saved_modules(self) for p in module.copies.parameters()}
        copies |= {id(p) for name, p in self.named_parameters() if is_bias_copy(name)}
        trained = sum(count_values(p) for p in self.parameters() if p.requires_grad)
        added = sum(count_values(p) for key, p in units.items() if key not in copies)
        return trained, count_base_parameters(self) + added

    def print_trainable_parameters(self) -> None:
        """Print the trained and all parameters, and their ratio in percent."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained} || all params: {total} || trainable%: {100 * trained / total}")

    def get_layer_status(self) -> list[status.LayerStatus]:
        """The state of each layer that carries an adapter."""
        return status.layer_status(self)

    def get_model_status(self) -> status.ModelStatus:
        """The state of all adapters together; what differs between layers is "irregular"."""
        return status.model_status(self)

    # --- a batch with an adapter for each row ------------------------------------------------------

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            args: as its own forward.
            adapter_names: the adapter for each row of the batch, `"__base__"` for none; by default the active ones
                serve all rows.
            kwargs: as its own forward.
        """
        if adapter_names is None:
            return super().__call__(*args, **kwargs)
        with self._mixed(adapter_names, args, kwargs):
            return super().__call__(*args, **kwargs)

    def _mixed(
        self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        self._check_names([name for name in dict.fromkeys(names) if name != mixing.BASE_MODEL], allow_none=True)
        self._check_not_merged("choose adapters by row")
        mixing.check_batch(names, args, kwargs)
        mixing.check_mixable(self, names)
        return mixing.mixed(self, names)

    # --- inside -----------------------------------------------------------------------------------

    def add_planned(
        self, plan: Plan, name: str, *, trainable: bool, values: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        """Add the adapter that `plan` describes (see `planning.make_plan`), with `values` as in `attach.attach`."""
        self._check_not_merged("add an adapter")
        attach.attach(self, plan, name, values)
        config = plan.config.replaced(inference_mode=not trainable)
        if config.base_model_name_or_path is None:
            config = config.replaced(base_model_name_or_path=getattr(self, "name_or_path", None) or None)
        if config.task_type is None:
            root = type(self)
            config = config.replaced(
                auto_mapping={"base_model_class": root.__name__, "parent_library": root.__module__}
            )
        self.peft_config[name] = config
        self.adapter_state.active = self.adapter_state.active or [name]
        self.refresh([name])

    def refresh(self, names: Sequence[str] | None = None) -> None:
        """Bring the layers in line with `adapter_state`, and with it what is trained of the adapters `names` (or all)."""
        state = self.adapter_state
        at_work = state.merged or state.active
        attach.choose_live(self, at_work if state.enabled else (), merged=bool(state.merged))
        for name in self.peft_config if names is None else names:
            is_trained = name in state.active and not self.peft_config[name].inference_mode
            attach.set_trainable(self, name, is_trained)

    def _names_or_all(self, names: str | Sequence[str] | None) -> list[str]:
        chosen = list(self.peft_config) if names is None else [names] if isinstance(names, str) else list(names)
        self._check_names(chosen)
        return chosen

    def _check_names(self, names: Sequence[str], allow_none: bool = False) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown or not (names or allow_none):
            had = ", ".join(map(repr, self.peft_config)) or "none"
            raise ValueError(f"no adapter is called {', '.join(map(repr, unknown)) or 'nothing'}; there are {had}")

    def _check_not_merged(self, action: str, remedy: str = "unmerge_adapter() first") -> None:
        if self.adapter_state.merged:
            raise RuntimeError(f"cannot {action}: {', '.join(self.adapter_state.merged)} is merged; {remedy}")


class AdaptedGenerator(AdaptedModel):
    """Mixin of a wrapped model that generates."""

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own `generate`; `adapter_names` as in `AdaptedModel.__call__`, one for each row of the input."""
        generate = super().generate  # type: ignore[misc]
        if adapter_names is None:
            return generate(*args, **kwargs)
        with self._mixed(adapter_names, args, kwargs):
            return generate(*args, **kwargs)


def is_wrapped(model: nn.Module) -> TypeGuard[AdaptedModel]:
    """Whether `model` carries adapters of pyadapt."""
    return is_adopted_by(model, AdaptedModel)


def make_adapted(model: nn.Module) -> AdaptedModel:
    """Turn a plain model into an adapted one that has no adapters yet: its weights are frozen."""
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    checkpointing = _is_checkpointing(model)
    model = adopt(model, AdaptedGenerator if hasattr(model, "generate") else AdaptedModel)
    model.peft_config = {}
    model.adapter_state = AdapterState(trained_before=trained)
    model._hf_peft_config_loaded = True
    model.requires_grad_(False)
    if checkpointing:
        # A checkpointed block whose inputs need no gradient is skipped by backward, and nothing would train.
        cast(Any, model).enable_input_require_grads()
    return model


def _is_checkpointing(model: nn.Module) -> bool:
    """Whether transformers recomputes activations in this model (the name changed in its version 5)."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    known = next((name for name in names if hasattr(type(model), name)), None)
    return known is not None and bool(getattr(model, known))


def forget_adapters(model: nn.Module) -> None:
    """Take off a model what `make_adapted` has set on it."""
    for attribute in ("peft_config", "adapter_state", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)


def _config_and_name(*args: Any, **kwargs: Any) -> tuple[Any, str]:
    """Sort out the argument orders of PEFT and transformers."""
    _check_only(kwargs, "adapter_name", "peft_config", "adapter_config", "config")
    values = [*args, *kwargs.values()]
    names = [value for value in values if isinstance(value, str)]
    configs = [value for value in values if value is not None and not isinstance(value, str)]
    if len(configs) != 1 or len(names) > 1:
        raise TypeError("add_adapter takes one configuration and one name, in either order")
    return configs[0], names[0] if names else "default"


def _check_only(given: dict[str, Any], *allowed: str) -> None:
    extra = sorted(given.keys() - set(allowed))
    if extra:
        raise TypeError(f"unexpected argument {', '.join(map(repr, extra))}; known are {', '.join(allowed)}")


def _upload(folder: Path, repo_id: str, token: Any = None, private: bool | None = None, **commit: Any) -> None:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ImportError('push_to_hub needs huggingface_hub: pip install "pyadapt[hub]"') from None
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=os.fspath(folder), **commit)
