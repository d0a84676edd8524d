"""A user's script, unchanged, under each launcher and each of examples/configs: losses and adapters of one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gang
import pytest
import torch
from safetensors.torch import load_file
from tolerance import assert_close, assert_near

import pyadapt

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIGS = ROOT / "examples" / "configs"
# fsdp1.yaml names T5's blocks, as FSDP1 needs it; the others are for any model.
BASES = {"ddp": "llama", "fsdp1": "t5", "fsdp2": "t5", "zero3": "t5", "zero3_offload": "t5"}
ENGINES = {"ddp": "MULTI_CPU", "fsdp1": "FSDP", "fsdp2": "FSDP", "zero3": "DEEPSPEED", "zero3_offload": "DEEPSPEED"}
# Trainer makes accelerate's state anew, for GPUs, unless it is told that there is one.
CPU_TRAINER = {"accelerator_config": {"use_configured_state": True}}
SECONDS = 240  # where DeepSpeed's CPU Adam is compiled first, it takes a minute


def make_bases(folder):
    """Weights of more than 100 000 values, which DeepSpeed's default threshold does not leave whole on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}
    llama = LlamaConfig(vocab_size=320, hidden_size=320, intermediate_size=320, initializer_range=0.05, **sizes)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    sizes = {"num_layers": 2, "num_heads": 4, "d_model": 320, "d_kv": 80, "d_ff": 320, "dropout_rate": 0.0}
    marks = {"decoder_start_token_id": 0, "pad_token_id": 0, "use_cache": False}
    t5 = T5Config(vocab_size=320, initializer_factor=0.3, **sizes, **marks)
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")


def start(*command, **environment):
    """A process of this Python's environment, on one core and offline."""
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    known.pop("ACCELERATE_USE_CPU", None)  # the other tests' own: under it accelerate knows no DeepSpeed
    known["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # The launchers lie beside this Python.
    known["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([str(part) for part in command], env=known, **options)


def finish(*processes):
    """Wait for them; the test fails with what they said unless all have succeeded."""
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    assert not any(process.returncode for process in processes), "\n".join(text[-6000:] for text in said)
    return said


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with the two models, and below `alone` what one process makes of them."""
    folder = tmp_path_factory.mktemp("bases")
    make_bases(folder)
    processes = []
    for name in ("llama", "t5"):
        (folder / "alone" / name).mkdir(parents=True)
        where = ("--base", folder / name, "--out", folder / "alone" / name)
        processes.append(start(sys.executable, HERE / "launched_script.py", *where))
    finish(*processes)
    return folder


def arguments(bases, name, out, **trainer):
    """The script behind what prepares accelerate for the CPU, and its options."""
    further = json.dumps({**CPU_TRAINER, **trainer})
    where = ("--base", bases / name, "--out", out)
    return (HERE / "cpu_launch.py", HERE / "launched_script.py", *where, "--arguments", further)


def check(bases, name, out, how):
    """Compare with one process; gives what rank 0 has written."""
    alone = bases / "alone" / name
    wanted, found = (json.loads((folder / "losses.json").read_text()) for folder in (alone, out))
    for kind in how:
        # What is compared moves by more than the tolerance from step to step.
        with pytest.raises(AssertionError):
            assert_near(torch.tensor(wanted[kind][1:]), torch.tensor(wanted[kind][:-1]), "loss")
        assert_near(torch.tensor(found[kind]), torch.tensor(wanted[kind]), "loss")
        ours, theirs = (load_file(folder / kind / "adapter_model.safetensors") for folder in (out, alone))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_close(ours[key], value, "gradient", value.dtype, f"{kind}: {key}")
    return found


def accelerate_launch(config, *options):
    """The command up to the script; the file as it is, and only what the machine has is said otherwise."""
    machine = ("--num_processes", "2", "--main_process_port", gang.free_port())
    return ("accelerate", "launch", "--config_file", config, *machine, *options)


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_a_config_of_the_examples_under_accelerate_launch(config, bases, tmp_path):
    if config.startswith("zero3"):
        pytest.importorskip("deepspeed")
    launcher = accelerate_launch(CONFIGS / f"{config}.yaml", "--mixed_precision", "no")  # bf16 would hide differences
    finish(start(*launcher, *arguments(bases, BASES[config], tmp_path)))
    found = check(bases, BASES[config], tmp_path, ["loop", "trainer"])
    assert found["ranks"] == 2
    assert found["engine"] == f"DistributedType.{ENGINES[config]}"


def test_the_deepspeed_launcher(bases, tmp_path):
    """A loop with accelerate, to which the environment gives DeepSpeed's configuration; Trainer's own argument."""
    pytest.importorskip("deepspeed")
    zero3 = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps(zero3 | {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0}))
    launcher = ("deepspeed", "--num_accelerators", 2, "--master_port", gang.free_port())
    said = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    finish(start(*launcher, *arguments(bases, "t5", tmp_path, deepspeed=zero3), **said))
    found = check(bases, "t5", tmp_path, ["loop", "trainer"])
    assert found["engine"] == "DistributedType.DEEPSPEED"


def agents_of_torchrun(*script, **environment):
    """Two agents, as on two nodes, of one process each."""
    rendezvous = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{gang.free_port()}", "--rdzv_id", "two")
    for node in range(2):
        launcher = ("torchrun", "--nnodes", 2, "--node_rank", node, "--nproc_per_node", 1, *rendezvous)
        yield start(*launcher, *script, **environment)


def test_two_agents_of_torchrun_with_trainers_own_fsdp(bases, tmp_path):
    fsdp = {"version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "SHARDED_STATE_DICT"}
    script = arguments(bases, "llama", tmp_path, fsdp="full_shard auto_wrap", fsdp_config=fsdp)
    finish(*agents_of_torchrun(*script, "--how", "trainer", ACCELERATE_USE_FSDP="true"))
    check(bases, "llama", tmp_path, ["trainer"])


def test_two_agents_of_torchrun_with_ddp(bases, tmp_path):
    finish(*agents_of_torchrun(*arguments(bases, "t5", tmp_path)))
    found = check(bases, "t5", tmp_path, ["loop", "trainer"])
    assert found["engine"] == "DistributedType.MULTI_CPU"


def test_rank_0_alone_reads_the_base(bases, tmp_path):
    """`fsdp_cpu_ram_efficient_loading`: the others get it, and the adapters' first values, when it is sharded."""
    config = (CONFIGS / "fsdp2.yaml").read_text()
    changed = re.sub(r"(fsdp_cpu_ram_efficient_loading:) false", r"\1 true", config)
    assert changed != config
    (tmp_path / "config.yaml").write_text(changed)
    launcher = accelerate_launch(tmp_path / "config.yaml", "--mixed_precision", "no")
    finish(start(*launcher, *arguments(bases, "llama", tmp_path)))
    check(bases, "llama", tmp_path, ["loop", "trainer"])


@pytest.mark.parametrize("config", ["fsdp1", "zero3_offload"])
def test_the_sharded_example(config, tmp_path):
    """As it is, in the bf16 of its configuration: it learns, generates, traces memory, and saves the whole adapter."""
    if config.startswith("zero3"):
        pytest.importorskip("deepspeed")
    out = tmp_path / "out"
    example = (ROOT / "examples" / "seq2seq_lora_sharded.py", "--tiny", "--output", out)
    (said,) = finish(start(*accelerate_launch(CONFIGS / f"{config}.yaml"), HERE / "cpu_launch.py", *example))
    (learned,) = re.findall(r"^accuracy: ([\d.]+) before training, ([\d.]+) after$", said, re.MULTILINE)
    assert float(learned[1]) > float(learned[0]) + 0.2
    epochs = re.findall(r"^epoch (\d): perplexity [\d.]+ in training, ([\d.]+) in evaluation", said, re.MULTILINE)
    assert [epoch for epoch, _ in epochs] == ["1", "2"]
    for stage in ("training", "evaluation"):
        traces = re.findall(rf"^memory, {stage} .*\n  GPU( +-?\d+){{4}}\n  CPU( +-?\d+){{4}}$", said, re.MULTILINE)
        assert len(traces) == len(epochs)
    from transformers import AutoModelForSeq2SeqLM

    model = pyadapt.load(AutoModelForSeq2SeqLM.from_pretrained(out / "base"), out)
    values = model.get_adapter_state_dict()
    assert all(bool(value.isfinite().all() and value.abs().sum() > 0) for value in values.values())
