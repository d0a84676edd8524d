"""Saving under DeepSpeed ZeRO-3: the bytes of a single process, from all ranks or from a state dict of the first."""

from __future__ import annotations

import gang
import zero3_cases

NAMES = ["lora", "lora-saved", "lora-bias", "lora-embedding", "lora-tokens", "dora", "prefix-mlp"]


def test_saved_bytes_are_those_of_one_process(tmp_path):
    for wrong in gang.run(2, zero3_cases.saved, str(tmp_path), NAMES):
        assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())
