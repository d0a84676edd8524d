"""transformers.Trainer over a wrapped model: it trains, saves adapters alone, and resumes where it stopped."""

from __future__ import annotations

import os

import pytest
import torch
from models import FAMILIES, assert_near, build, copy_adapter_to_peft, model_batch, peft_twin
from safetensors.torch import load_file, save_file

import pyadapt
from pyadapt import LoraConfig
from pyadapt.files import AdapterFileError
from pyadapt.trained import MARK

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of one family."""

    def __init__(self, name):
        batch = model_batch(name, rows=16)
        self.rows = [{key: value[i] for key, value in batch.items()} for i in range(16)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer(model, folder, name="llama", **options):
    from transformers import Trainer, TrainingArguments

    options = {"max_steps": 4, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        output_dir=os.fspath(folder), per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        report_to=[], disable_tqdm=True, seed=11, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Rows(name), eval_dataset=Rows(name))


def losses_of(run):
    return torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])


def wrapped(name="llama", **config):
    torch.manual_seed(3)
    config = {"r": 4, "task_type": FAMILIES[name].task, "init_lora_weights": False, **config}
    return pyadapt.wrap(build(name), LoraConfig(**config))


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_losses_equal_those_of_peft(name, tmp_path):
    model = wrapped(name)
    targets = list(FAMILIES[name].targets)
    twin = peft_twin(build(name), r=4, target_modules=targets, task_type=FAMILIES[name].task)
    copy_adapter_to_peft(model, twin)
    ours, theirs = trainer(model, tmp_path / "a", name), trainer(twin, tmp_path / "b", name)
    ours.train()
    theirs.train()
    assert_near(losses_of(ours), losses_of(theirs), "loss")
    ours.save_model(os.fspath(tmp_path / "saved"))
    files = set(os.listdir(tmp_path / "saved"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any(file.startswith("model") for file in files)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_by_argument(reentrant, tmp_path):
    plain = trainer(wrapped(), tmp_path / "a")
    plain.train()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = trainer(wrapped(), tmp_path / "b", **options)
    checkpointed.train()
    assert_near(losses_of(checkpointed), losses_of(plain), "loss")


def test_bf16_by_argument(tmp_path):
    run = trainer(wrapped(), tmp_path, bf16=True)
    run.train()
    plain = trainer(wrapped(), tmp_path / "plain")
    plain.train()
    assert_near(losses_of(run), losses_of(plain), "loss", torch.bfloat16)


def test_int8_base_is_let_in(tmp_path):
    """Trainer refuses quantised models unless they carry adapters."""
    torch.manual_seed(3)
    model = pyadapt.wrap(pyadapt.quantize(build("llama")), LoraConfig(init_lora_weights=False))
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    assert len(losses_of(run)) == 4
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(".adapters.default." in name for name in kept.keys() - {MARK})


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resume_is_exact(tmp_path, dropout):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(wrapped(lora_dropout=dropout), tmp_path / "whole", **options)
    whole.train()
    model = wrapped(lora_dropout=dropout)
    with torch.no_grad():
        # Another start: only the checkpoint can bring the right weights.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    resumed = trainer(model, tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=os.fspath(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(losses_of(resumed), losses_of(whole))
    for (name, ours), (_, theirs) in zip(model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_load_best_model_at_end(tmp_path):
    model = wrapped()
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(model, tmp_path, load_best_model_at_end=True, **options)
    run.train()
    saved = pyadapt.load(build("llama"), run.state.best_model_checkpoint)
    batch = model_batch("llama")
    assert_near(model.eval()(**batch).logits, saved(**batch).logits, "model")


@pytest.mark.parametrize("other", [{"r": 8}, {"target_modules": ["q_proj"]}])
def test_checkpoint_of_other_adapters_is_refused(other, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(wrapped(), tmp_path, **options).train()
    model = wrapped(**other)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"other adapters than this(.|\n)*lora_A"):
        trainer(model, tmp_path, **options).train(resume_from_checkpoint=os.fspath(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_a_checkpoint_pass_for_no_model(tmp_path):
    model = wrapped()
    folder = tmp_path / "checkpoint-7"
    model.save_pretrained(folder)
    kept = load_file(folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=MARK):
        build("llama").load_state_dict(kept)
    # What a Trainer has copied beside the adapters for the hub goes with the next save.
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    # A whole model's file is none of ours.
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_state_dicts_without_the_base():
    """Strict loading wants all of the base or nothing, and all of the adapters."""
    model = wrapped()
    tensors = model.state_dict()
    adapters = {name: value for name, value in tensors.items() if ".adapters." in name}
    model.load_state_dict(adapters)
    model.load_state_dict(tensors)
    some = dict(list(tensors.items())[3:])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(some)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(dict(list(adapters.items())[1:]))
    plain = pyadapt.unwrap(model)
    with pytest.raises(RuntimeError, match="Missing key"):
        plain.load_state_dict({})


def test_adalora_resumes_with_its_schedule(tmp_path):
    config = {
        "init_r": 4,
        "target_r": 2,
        "tinit": 1,
        "tfinal": 1,
        "deltaT": 1,
        "total_step": 4,
        "task_type": "CAUSAL_LM",
    }
    options = {"save_strategy": "steps", "save_steps": 2}

    def start():
        torch.manual_seed(3)
        model = pyadapt.wrap(build("llama"), {"peft_type": "ADALORA", "task_type": "CAUSAL_LM", **config})
        run = trainer(model, tmp_path, **options)
        run.add_callback(pyadapt.AdaLoraCallback())
        return run

    whole, resumed = start(), start()
    whole.train()
    resumed.train(resume_from_checkpoint=os.fspath(tmp_path / "checkpoint-2"))
    assert torch.equal(losses_of(resumed), losses_of(whole))
    wanted = whole.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.model.state_dict().items())
