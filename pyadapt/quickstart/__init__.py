"""`pyadapt quickstart`: fine-tune a small model here, in about a minute, and prove the result.

By default MiniLM learns, over an int8 base, which package of the standard library a docstring comes from. The
same command serves any local or hub model and any JSON-lines file. `story.py` tells it from beginning to end;
every other file is one part of it.
"""

from __future__ import annotations

import sys

from .errors import QuickstartError
from .options import Options, add_arguments

__all__ = ["Options", "QuickstartError", "add_arguments", "run"]


def run(options: Options) -> int:
    """Run the quick start and print its table; 0 when all went well, 2 after a one-line error about input."""
    from .story import quickstart

    try:
        print(quickstart(options).table())
    except QuickstartError as error:
        print(f"pyadapt quickstart: error: {error}", file=sys.stderr)
        return 2
    print(f"written to {options.out}: adapter/, merged/, training.png, summary.json")
    return 0
