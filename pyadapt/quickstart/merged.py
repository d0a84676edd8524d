"""The merged model under plain transformers: another process, in which pyadapt cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

READER = Path(__file__).with_name("plain_reader.py")


def logits_of_merged(folder: Path, texts: list[str], max_length: int) -> Tensor:
    """What the model in `folder` says about `texts`: (texts, labels) in fp32.

    Raises RuntimeError, with the last line that the process wrote, where it cannot read the folder.
    """
    import torch

    request = json.dumps({"folder": str(folder.resolve()), "texts": texts, "max_length": max_length})
    # The folder as working directory: `python -c` looks for modules there first, and it holds none.
    done = subprocess.run(
        [sys.executable, "-c", READER.read_text(encoding="utf-8")],
        input=request,
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"plain transformers cannot use the merged model in {folder}: {last}")
    answer = json.loads(done.stdout)
    if answer["pyadapt"]:
        raise RuntimeError("the process that was to do without pyadapt had imported it")
    return torch.tensor(answer["logits"])
