"""No engine keeps more of a frozen model than its part: counted, not guessed from resident memory."""

from __future__ import annotations

import gang
import memory_cases
import pytest
from source_tree import ROOT

if not (ROOT / "benchmarks").is_dir():
    pytest.skip("waits for a source tree: benchmarks are not installed", allow_module_level=True)


@pytest.mark.parametrize("methods", [("lora", "dora"), ("ia3", "loha", "lokr")], ids=" ".join)
@pytest.mark.parametrize("engine", ["zero3", "fsdp1", "fsdp2"])
def test_no_gathered_weight_stays(engine, methods):
    """After forward, and after a step, none of the weights that were gathered is alive, in any form."""
    for found in gang.run(2, memory_cases.kept, engine, methods, group=False):
        assert found == {"control": "caught"}
