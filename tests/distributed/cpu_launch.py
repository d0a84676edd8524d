"""Run a script under a launcher on a machine without GPUs: `<launcher> cpu_launch.py script.py arguments`.

accelerate forms no process group on the CPU for DeepSpeed or FSDP, and says nothing: each rank would train alone. Here
its state is made as it is on GPUs, with gloo in NCCL's place, and then the script is run as it is.
"""

from __future__ import annotations

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


def prepare() -> None:
    """Make accelerate's state for the engine that the launcher has named in the environment."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        PartialState(backend="gloo")
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState(backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        PartialState(cpu=True)


if __name__ == "__main__":
    prepare()
    # The deepspeed launcher puts --local_rank=... before all else.
    given = sys.argv[1:]
    script = next(part for part in given if not part.startswith("--"))
    given.remove(script)
    sys.argv = [script, *given]
    sys.path[0] = os.path.dirname(script)  # as when it is started itself
    runpy.run_path(sys.argv[0], run_name="__main__")
