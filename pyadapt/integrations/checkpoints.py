"""Which of Trainer's checkpoints are whole: a process that was killed may have left half of one, in its place."""

from __future__ import annotations

import logging
import os
import re
import zipfile

from safetensors import SafetensorError, safe_open

from ..files import Path

logger = logging.getLogger("pyadapt")

_NAME = re.compile(r"checkpoint-(\d+)")
# What Trainer writes last, and so what half a checkpoint lacks.
_LAST = "trainer_state.json"
_PICKLES = (".pt", ".pth", ".bin", ".distcp")


def last_checkpoint(output_dir: Path) -> str | None:
    """The newest of Trainer's checkpoints in a folder that is whole; None where there is none, or no such folder.

        trainer.train(resume_from_checkpoint=pyadapt.last_checkpoint(output_dir))

    transformers' own `get_last_checkpoint`, which `resume_from_checkpoint=True` asks, takes the newest as it is.
    """
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    numbers = {int(match.group(1)): match.group() for name in names if (match := _NAME.fullmatch(name))}
    for number in sorted(numbers, reverse=True):
        folder = os.path.join(output_dir, numbers[number])
        why = _damage(folder)
        if why is None:
            return folder
        logger.warning("%s is passed over: %s, as where a process was killed while it was writing", folder, why)
    return None


def _damage(folder: str) -> str | None:
    """What is wrong with a checkpoint, None where nothing is."""
    if not os.path.isfile(os.path.join(folder, _LAST)):
        return f"it has no {_LAST}"
    for at, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(at, name)
            if not _is_whole(path):
                return f"{os.path.relpath(path, folder)} is damaged"
    return None


def _is_whole(path: str) -> bool:
    """Whether a file has its end, as far as its format says; nothing in it is loaded."""
    if path.endswith(".safetensors"):
        try:
            with safe_open(path, "pt") as file:
                return len(list(file.keys())) >= 0
        except (OSError, SafetensorError):
            return False
    # The directory of torch's archives lies at their end. DCP's files are several archives, one behind the other.
    return not path.endswith(_PICKLES) or zipfile.is_zipfile(path)
