"""LoRA on T5 with the model sharded over GPUs, by FSDP or by DeepSpeed ZeRO-3 with CPU offload: a loop with accelerate.

One script, and the engine is what the configuration says. It prints the memory that each stage takes, the perplexity of
training and evaluation, and how many generated answers are right.

    accelerate launch --config_file examples/configs/fsdp1.yaml examples/seq2seq_lora_sharded.py
    accelerate launch --config_file examples/configs/zero3_offload.yaml examples/seq2seq_lora_sharded.py
    python examples/seq2seq_lora_sharded.py --tiny        offline, seconds, one process (or under accelerate launch)

T0 with 3 billion weights on zeroshot/twitter-financial-news-sentiment; other models: docs/distributed.md.
"""

from __future__ import annotations

import contextlib
import math

import torch
from accelerate import Accelerator
from common import arguments, report
from memory import MemoryTrace
from prefix_tuning_seq2seq import load_rows, tiny_base  # the same task
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import pyadapt

REAL = {"model": "bigscience/T0_3B", "dataset": "zeroshot/twitter-financial-news-sentiment"}
REAL |= {"epochs": 5, "batch_size": 8, "lr": 1e-3}  # the batch of each GPU
TINY = {"epochs": 2, "batch_size": 16, "lr": 1e-2}


def make_collate(tokenizer):
    """Rows to a batch; a label -100 is padding, which the loss passes over."""

    def collate(rows):
        texts, answers = ([row[name] for row in rows] for name in ("text", "answer"))
        batch = tokenizer(texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
        answers = tokenizer(answers, padding=True, return_tensors="pt")
        batch["labels"] = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        return batch

    return collate


def train(accelerator, model, optimizer, loader):
    """The mean loss of an epoch."""
    model.train()
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().float()).mean())
    return torch.stack(losses).mean().item()


def ready_to_generate(model):
    """`generate` calls encoder and decoder one by one, and not FSDP1's outermost unit, which has the embeddings."""
    if isinstance(model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False)
    return contextlib.nullcontext()


@torch.no_grad()
def evaluate(accelerator, model, tokenizer, loader):
    """(mean loss, share of the rows whose generated answer is right)."""
    model.eval()
    losses, right = [], []
    for batch in loader:
        losses.append(accelerator.gather(model(**batch).loss.float()).mean())
        labels = batch.pop("labels")
        with ready_to_generate(model):
            # Ranks that have finished go on until all have: each step of a sharded model needs every rank.
            several = accelerator.num_processes > 1
            ids = accelerator.unwrap_model(model).generate(**batch, max_new_tokens=8, synced_gpus=several)
        labels = labels.masked_fill(labels < 0, tokenizer.pad_token_id)
        found, wanted = (tokenizer.batch_decode(part, skip_special_tokens=True) for part in (ids, labels))
        hits = [ours.strip() == theirs.strip() for ours, theirs in zip(found, wanted, strict=True)]
        right.append(accelerator.gather_for_metrics(torch.tensor(hits, device=accelerator.device)))
    return torch.stack(losses).mean().item(), torch.cat(right).double().mean().item()


def main():
    args = arguments(__doc__, REAL, TINY)
    accelerator = Accelerator()
    if args.tiny and accelerator.is_main_process:
        tiny_base(args.model)
    accelerator.wait_for_everyone()
    train_rows, test_rows = load_rows(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    options = {"batch_size": args.batch_size, "collate_fn": make_collate(tokenizer)}

    def make_base():
        # Frozen weights need no more digits than the computation has; the adapter is in fp32 all the same.
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        return AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=dtype)

    config = pyadapt.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=32, lora_dropout=0.1)
    model = pyadapt.wrap(make_base(), config)
    if accelerator.is_main_process:
        model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    loaders = DataLoader(train_rows, shuffle=True, **options), DataLoader(test_rows, **options)
    # All at once: so FSDP2 wants it, and DeepSpeed reads the batch size from the loaders.
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, *loaders)

    _, before = evaluate(accelerator, model, tokenizer, test_loader)
    for epoch in range(args.epochs):
        with MemoryTrace() as training:
            train_loss = train(accelerator, model, optimizer, train_loader)
        with MemoryTrace() as evaluation:
            loss, after = evaluate(accelerator, model, tokenizer, test_loader)
        accelerator.print(training.table("training"), evaluation.table("evaluation"), sep="\n")
        perplexity = f"perplexity {math.exp(train_loss):.3f} in training, {math.exp(loss):.3f} in evaluation"
        accelerator.print(f"epoch {epoch + 1}: {perplexity}; accuracy {after:.3f}")

    # Every rank comes here: the adapter is gathered, and rank 0 writes it.
    accelerator.unwrap_model(model).save_pretrained(args.output)
    if accelerator.num_processes == 1:
        # The adapter over a fresh base, as a user of it would load it.
        fresh = pyadapt.load(make_base().to(accelerator.device), args.output)
        again = evaluate(accelerator, fresh, tokenizer, test_loader)
        assert again == (loss, after), "the loaded adapter answers otherwise than the trained one"
    if accelerator.is_main_process:
        report("accuracy", before, after, args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
