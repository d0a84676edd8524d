"""A model too large for one GPU, spread by its device_map over GPUs, CPU and disk; an adapter is loaded onto it.

transformers and accelerate place the layers, and bring those that lie elsewhere for their forward. The adapter of each
layer is put beside it. Layers on the disk run as they are, but carry no adapter.

    python examples/big_model_inference.py --tiny        offline, seconds: two blocks, one of them on the disk
    python examples/big_model_inference.py --adapter FOLDER --gpu-memory 10GiB --cpu-memory 60GiB
                                                         bigscience/bloomz-7b1 on ought/raft (twitter_complaints)
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import DEVICE, arguments, report
from prompt_tuning_causal_lm import judge, load_rows, make_collate, question, tiny_base  # the same task
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyadapt

REAL = {"model": "bigscience/bloomz-7b1", "dataset": "ought/raft", "epochs": 0, "batch_size": 8, "lr": 0.0}
TINY = {"epochs": 3, "batch_size": 32, "lr": 1e-2}
OPTIONS = {
    "adapter": "folder or hub name of an adapter of this model",
    "gpu_memory": 'what each GPU may hold ("10GiB")',
    "cpu_memory": 'what the CPU may hold ("60GiB")',
}
# What accelerate would work out from smaller limits.
TINY_PLACES = dict.fromkeys(["word_embeddings", "word_embeddings_layernorm", "h.0", "ln_f"], "cpu") | {"h.1": "disk"}
TINY_PLACES = {f"transformer.{path}": place for path, place in TINY_PLACES.items()} | {"lm_head": "cpu"}


def tiny_adapter(args, tokenizer, rows):
    """Train one for the tiny model, on the block that will stay in memory; its folder."""
    model = AutoModelForCausalLM.from_pretrained(args.model)
    targets = {"target_modules": ["query_key_value", "dense_h_to_4h"], "layers_to_transform": [0]}
    model = pyadapt.wrap(model, pyadapt.LoraConfig(task_type="CAUSAL_LM", r=8, **targets)).to(DEVICE)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    for _ in range(args.epochs):
        for batch in DataLoader(rows, args.batch_size, shuffle=True, collate_fn=make_collate(tokenizer)):
            model.train()(**batch.to(DEVICE)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(args.output)
    return args.output


def spread(args):
    """The model, each of its layers where there is room for it."""
    if args.tiny:
        places, room = TINY_PLACES, None
    else:
        gpus = {number: args.gpu_memory for number in range(torch.cuda.device_count()) if args.gpu_memory}
        places, room = "auto", gpus | ({"cpu": args.cpu_memory} if args.cpu_memory else {}) or None
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.float32 if args.tiny else torch.bfloat16,
        device_map=places,
        max_memory=room,
        offload_folder=args.output / "offloaded",
    )
    for path, place in model.hf_device_map.items():
        print(f"{path}: {place}")
    return model


def main():
    args = arguments(__doc__, REAL, TINY, **OPTIONS)
    if args.tiny:
        tiny_base(args.model)
    elif not args.adapter:
        raise SystemExit("--adapter is needed: the folder of an adapter of this model (or use --tiny)")
    train_rows, test_rows = load_rows(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    adapter = args.adapter or tiny_adapter(args, tokenizer, train_rows)

    model = spread(args)
    _, before = judge(model, tokenizer, test_rows, args.batch_size)
    model = pyadapt.load(model, adapter)
    found, after = judge(model, tokenizer, test_rows, args.batch_size)
    print(f"{question(test_rows[0])} -> {found[0]}")
    if Path(adapter).is_dir():
        report("accuracy", before, after, Path(adapter))


if __name__ == "__main__":
    main()
