"""Models that `deepspeed.zero.Init` makes in parts: wrapped, quantised and trained as whole ones."""

from __future__ import annotations

import gang
import pytest
import zero_init_cases
from methods_cases import LORA
from models import build
from zero_init_cases import STARTS

import pyadapt


def right(function, *args):
    """What went wrong is nothing."""
    for wrong in gang.run(2, function, *args):
        assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())


def test_starts_that_read_weights():
    right(zero_init_cases.made_in_parts, list(STARTS))


@pytest.mark.parametrize(
    "names",
    [
        ["lora-t5", "lora-saved", "lora-bias", "lora-embedding", "lora-tokens"],
        ["lora-gpt2", "dora", "ia3", "lokr", "p-tuning", "prefix"],
    ],
)
def test_methods(names):
    right(zero_init_cases.made_in_parts, names)


@pytest.mark.parametrize("base", ["int8", "bf16"])
def test_bases(base):
    right(zero_init_cases.made_in_parts, ["lora", "lora-gpt2", "dora", "pissa", "lokr"], base)


def test_transformers_makes_the_model(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    pyadapt.wrap(build("llama"), LORA).save_pretrained(tmp_path / "adapter")
    right(zero_init_cases.from_pretrained_in_parts, str(tmp_path))
