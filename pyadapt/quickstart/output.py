"""The output folder: filled aside, then put in place, so that a failed run leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import QuickstartError


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield an empty folder; what it holds at the end replaces what `out` has under the same names."""
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Inside `out`, so that the moves at the end stay on one file system.
        stage = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=out))
    except OSError as error:
        raise QuickstartError(f"--out {out}: {error.strerror}") from None
    try:
        yield stage
        for made in sorted(stage.iterdir()):
            _replace(made, out / made.name)
    finally:
        shutil.rmtree(stage)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def folder_bytes(folder: Path, pattern: str = "*.safetensors") -> int:
    """The size of all files in `folder` whose names match."""
    return sum(path.stat().st_size for path in folder.glob(pattern))


def _replace(made: Path, place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    os.replace(made, place)
