"""Files written under DDP, FSDP1 and FSDP2 are those of one process, byte for byte."""

import fsdp_cases
import gang
import pytest

NAMES = ["lora", "lora-saved", "lora-bias", "lora-embedding", "lora-tokens", "dora", "p-tuning"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_bytes_of_one_process(engine, tmp_path):
    names = [name for name in NAMES if (engine, name) != ("fsdp1_flat", "lora-bias")]
    wrong = gang.run(2, fsdp_cases.save_all, engine, names, str(tmp_path))
    assert wrong == [{}, {}], "\n".join(f"{name}: {text}" for one in wrong for name, text in one.items())


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
def test_saving_on_one_rank_names_the_other(engine):
    said = gang.run(2, fsdp_cases.save_on_first_rank_alone, engine)[0]
    assert "rank 1 did not come here" in said
    assert "is_main_process" in said
