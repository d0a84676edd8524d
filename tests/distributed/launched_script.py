"""A script as a user writes it, which knows nothing of engines: a loop with accelerate, then transformers' Trainer.

    <launcher> launched_script.py --base FOLDER --out FOLDER [--how loop trainer] [--arguments JSON]

Rank 0 writes the losses of all steps to OUT/losses.json; the adapters go to OUT/loop and OUT/trainer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

import pyadapt

STEPS, GLOBAL_BATCH = 3, 4
# Of Adam: as small as it is by default, gradients near zero make large steps of the order in which ranks add.
EPSILON = 1e-3


def wrapped(folder):
    """LoRA on the model in a folder, with values in B as well, so that it counts from the first step."""
    two = AutoConfig.from_pretrained(folder).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if two else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    task = "SEQ_2_SEQ_LM" if two else "CAUSAL_LM"
    return pyadapt.wrap(model, pyadapt.LoraConfig(task_type=task, r=4, init_lora_weights=False))


def rows():
    """The same on every rank; all of one length, so that the mean over ranks is the mean over the batch."""
    generator = torch.Generator().manual_seed(2)
    draw = torch.randint(3, 60, (STEPS * GLOBAL_BATCH, 2, 8), generator=generator)
    return [{"input_ids": question, "labels": answer} for question, answer in draw]


def loop(folder, out):
    """A plain loop; the losses of all ranks together, step by step."""
    accelerator = Accelerator()
    model = wrapped(folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loader = DataLoader(rows(), batch_size=GLOBAL_BATCH // accelerator.num_processes)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, eps=EPSILON)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().float()).mean().item())
    accelerator.unwrap_model(model).save_pretrained(out / "loop")
    accelerator.wait_for_everyone()
    found = losses, str(accelerator.distributed_type), accelerator.num_processes
    if accelerator.state.deepspeed_plugin is not None:
        # accelerate has one DeepSpeed configuration a process, and Trainer brings its own.
        AcceleratorState._reset_state()
    return found


def train(folder, out, arguments):
    """The same steps with Trainer."""
    options = TrainingArguments(
        output_dir=str(out / "trainer-out"),
        learning_rate=1e-3,
        adam_epsilon=EPSILON,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        # Trainer multiplies a loss by the number of ranks that T5, unlike Llama, does not divide by all ranks' tokens.
        average_tokens_across_devices=False,
        **arguments,
    )
    options.per_device_train_batch_size = GLOBAL_BATCH // options.world_size
    trainer = Trainer(model=wrapped(folder), args=options, train_dataset=rows())
    trainer.train()
    trainer.model.save_pretrained(out / "trainer")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--how", nargs="+", default=["loop", "trainer"])
    parser.add_argument("--arguments", type=json.loads, default={}, help="further arguments of Trainer")
    args, _ = parser.parse_known_args()  # the deepspeed launcher adds --local_rank
    found = {}
    if "loop" in args.how:
        found["loop"], found["engine"], found["ranks"] = loop(args.base, args.out)
    if "trainer" in args.how:
        found["trainer"] = train(args.base, args.out, args.arguments)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        (args.out / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
