"""Writing the adapters of a wrapped model."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..distributed import agreement
from ..distributed.sharding import sharding_of
from ..files import Path
from ..trained import remove_trained_state, write_trained_state
from .adapters import AdapterVerbs

# The folders that transformers' Trainer writes to resume from.
_TRAINERS = re.compile(r"checkpoint-\d+")


class FileVerbs(AdapterVerbs):
    """Saving and uploading."""

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
            state_dict: the whole model's state dict where an engine has gathered it. Without it, every rank of a
                sharded model has to call: what is needed is gathered, and rank 0 writes.
            is_main_process: other processes write nothing.
            push_to_hub: upload the folder afterwards; `repo_id`, `token`, `private`, `commit_message` are passed on.
            as_plain_lora: write an adapter that started from its layers' weights (PiSSA, OLoRA) as a plain LoRA of
                twice the rank, for which nothing is factored when it is loaded.
            path_initial_model_for_weight_conversion: PEFT's way to ask for the same. The adapter's start is known here,
                so nothing is read from this folder.
            kwargs: further options of transformers' and PEFT's `save_pretrained`, which mean nothing for adapters here.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.check_names(names)
        if os.path.isfile(save_directory):
            raise ValueError(f"{os.fspath(save_directory)} is a file; a folder is needed")
        plain = as_plain_lora or path_initial_model_for_weight_conversion is not None
        sharding = sharding_of(self) if state_dict is None else None
        if sharding is not None:
            # What each rank holds is a part: all come here and gather, and the first writes.
            agreement.agree("saving the adapters", {"adapters": names})
            is_main_process = is_main_process and agreement.rank() == 0
        for name in names if is_main_process or sharding is not None else ():
            with agreement.together(f"saving adapter {name!r}", among_ranks=sharding is not None):
                config = self.peft_config[name]
                checkpoint.save_adapter(self, save_directory, name, config, state_dict, plain, writes=is_main_process)
        if is_main_process and names:
            self._keep_for_resuming(os.fspath(save_directory), state_dict is None and sharding is None)
        if is_main_process and push_to_hub:
            hub = {key: kwargs[key] for key in ("token", "private", "commit_message") if key in kwargs}
            _upload(save_directory, kwargs.get("repo_id") or os.path.basename(os.path.abspath(save_directory)), **hub)

    def _keep_for_resuming(self, folder: str, has_all: bool) -> None:
        """Leave what transformers' Trainer reads back beside the adapters, in its own checkpoints and nowhere else.

        Trainer looks for `model.safetensors` in them: of adapter files it knows peft's class alone. Sharded models are
        read back through their engine.
        """
        if has_all and _TRAINERS.fullmatch(os.path.basename(os.path.abspath(folder))):
            write_trained_state(self, folder)
        else:
            remove_trained_state(folder)

    def push_to_hub(self, repo_id: str, **hub: Any) -> None:
        """Upload the adapters to the hub repository `repo_id` (`token`, `private`, `commit_message`)."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            _upload(folder, repo_id, **hub)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One adapter's tensors under their keys in a file, without the leading `base_model.model.`."""
        name = self.active_adapter if adapter_name is None else adapter_name
        self.check_names([name])
        tensors = checkpoint.as_in_file(self, name, state_dict)
        return {key.removeprefix(checkpoint.KEY_PREFIX): tensor for key, tensor in tensors.items()}


def _upload(folder: Path, repo_id: str, token: Any = None, private: bool | None = None, **commit: Any) -> None:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ImportError('push_to_hub needs huggingface_hub: pip install "pyadapt[hub]"') from None
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=os.fspath(folder), **commit)
