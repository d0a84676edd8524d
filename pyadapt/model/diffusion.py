"""What diffusers' own names for adapters mean on a wrapped model: there they look for peft's layers, and find none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from . import mixing
from .adapters import AdapterVerbs
from .calls import Calls

# Arguments of diffusers' models that may carry a factor for the adapters, under "scale".
_CARRIERS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class DiffusionVerbs(AdapterVerbs, Calls):
    """The names of diffusers' `PeftAdapterMixin`, so that its pipelines find what they call."""

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """See `Calls.__call__`; a "scale" in `cross_attention_kwargs` and the like holds for the adapters at work."""
        scale = next((kwargs[name]["scale"] for name in _CARRIERS if "scale" in (kwargs.get(name) or {})), 1.0)
        if scale == 1.0:
            return super().__call__(*args, adapter_names=adapter_names, **kwargs)
        chosen = self.adapter_state.active if adapter_names is None else dict.fromkeys(adapter_names)
        with self.rescaled(scale, [name for name in chosen if name != mixing.BASE_MODEL]):
            return super().__call__(*args, adapter_names=adapter_names, **kwargs)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Make adapters active together, each `weights` times what its configuration says (by default 1).

        Raises:
            ValueError: an unknown name, a method without a scaling, or a weight for single blocks.
            RuntimeError: adapters are merged.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        each = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(each) != len(names):
            raise ValueError(f"{len(names)} adapters and {len(each)} weights; one weight an adapter is needed")
        if any(isinstance(weight, dict) for weight in each):
            raise ValueError("weights: a number an adapter is needed; weights for single blocks are not known here")
        self.check_names(names)
        self.check_not_merged("switch adapters")
        for name, weight in zip(names, each, strict=True):
            # A method without a scaling is at work as it is.
            if weight is not None or hasattr(self.peft_config[name], "scaling_of"):
                self.set_scale(name, 1.0 if weight is None else weight)
        self.set_adapter(names)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """`delete_adapter` under diffusers' name."""
        self.delete_adapter(adapter_names)

    def disable_lora(self) -> None:
        """`disable_adapters` under diffusers' name."""
        self.disable_adapters()

    def enable_lora(self) -> None:
        """`enable_adapters` under diffusers' name."""
        self.enable_adapters()

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        """`merge_adapter` under diffusers' name, after `rescale` by `lora_scale`; every merge here is a safe one."""
        names = list(self.adapter_state.active if adapter_names is None else adapter_names)
        if lora_scale != 1.0:
            self.rescale(lora_scale, names)
        self.merge_adapter(names)

    def unfuse_lora(self) -> None:
        """`unmerge_adapter` under diffusers' name."""
        self.unmerge_adapter()

    def unload_lora(self) -> None:
        """`unload` under diffusers' name: the model is plain again."""
        self.unload()

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """`pad_ranks` under diffusers' name; here it comes after the adapters, and before compiling."""
        self.pad_ranks(target_rank)

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it would put peft's layers around those that are adapted here."""
        raise RuntimeError(
            "this model carries adapters of pyadapt, among which diffusers cannot put one of its own: use "
            "model.load_adapter(path, name), which reads PEFT's folders and the files of kohya and LyCORIS"
        )

    def save_lora_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: diffusers looks for the weights in peft's layers."""
        raise RuntimeError("this model carries adapters of pyadapt: model.save_pretrained(folder) writes them")

    def fuse_qkv_projections(self) -> None:
        """The model's own, which copies weights into new layers, without any adapter.

        Raises:
            RuntimeError: adapters could be at work beside what it copies.
        """
        raise RuntimeError(
            "fused projections are copies of the weights, without the adapters: pyadapt.merge(model) first, then fuse"
        )
