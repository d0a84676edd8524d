"""Prompt tuning of a causal language model: is a tweet a complaint? The prompt starts from a text and is trained.

A plain training loop, then `generate` with the trained prompt in front. The model itself stays frozen.

    python examples/prompt_tuning_causal_lm.py --tiny        offline, seconds
    python examples/prompt_tuning_causal_lm.py               bigscience/bloomz-560m on ought/raft (twitter_complaints)
"""

from __future__ import annotations

import random

import torch
from common import DEVICE, arguments, hub_rows, report, word_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyadapt

REAL = {"model": "bigscience/bloomz-560m", "dataset": "ought/raft", "epochs": 50, "batch_size": 8, "lr": 3e-2}
TINY = {"epochs": 6, "batch_size": 32, "lr": 5e-2}
PROMPT = "Classify if the tweet is a complaint or not"  # where the prompt starts from
TINY_WORDS = {"complaint": ["broken", "late", "rude", "refund"], "praise": ["great", "fast", "thanks", "lovely"]}
TINY_FILLERS, TINY_TOPICS = ["my", "order", "from", "you", "today", "again"], ["phone", "train", "hotel"]


def tiny_rows(count, seed):
    """Tweets: words of no meaning, two of a complaint or of praise, and the name of a topic."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        answer, topic = ["complaint", "praise"][number % 2], draw.choice(TINY_TOPICS)
        words = draw.choices(TINY_FILLERS, k=4) + draw.choices(TINY_WORDS[answer], k=2) + [topic]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "answer": answer, "topic": topic})
    return rows


def tiny_base(folder):
    """A tiny BLOOM, trained to label a tweet with its topic, at times as complaint or praise; and its tokenizer.

    A prompt steers what a model knows; random weights know nothing.
    """
    from transformers import BloomConfig, BloomForCausalLM

    rows = tiny_rows(768, seed=0)
    tokenizer = word_tokenizer([*(f"{question(row)} {row['answer']}" for row in rows), PROMPT])
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
    marks = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    model = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), **sizes, **marks))
    collate = make_collate(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = random.Random(0)
    for _ in range(150):
        part = [{**row, "answer": row[draw.choice(["topic", "topic", "answer"])]} for row in draw.sample(rows, 64)]
        model(**collate(part)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def load_rows(args):
    """(rows to train on, rows to judge by); a row has a text and the answer that is to follow it."""
    if args.tiny:
        return tiny_rows(320, seed=1), tiny_rows(96, seed=2)
    # main holds a script, which is no longer run; the test rows of this data set have no labels
    rows = hub_rows(args.dataset, data_dir="twitter_complaints", revision="refs/convert/parquet", split="train")
    names = rows.features["Label"].names
    parts = rows.map(lambda row: {"text": row["Tweet text"], "answer": names[row["Label"]]})
    parts = parts.train_test_split(test_size=0.2, seed=1)
    return parts["train"], parts["test"]


def question(row):
    return f"Tweet text : {row['text']} Label :"


def make_collate(tokenizer):
    """Rows to a batch, padded on the left; the loss looks at the answers alone."""

    def collate(rows):
        asked = tokenizer([question(row) for row in rows])["input_ids"]
        answers = tokenizer([" " + row["answer"] for row in rows], add_special_tokens=False)["input_ids"]
        ids = [begin + end + [tokenizer.eos_token_id] for begin, end in zip(asked, answers, strict=True)]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        batch["labels"] = batch["input_ids"].clone()
        for labels, end in zip(batch["labels"], answers, strict=True):
            labels[: -len(end) - 1] = -100  # the loss passes these over
        return batch

    return collate


def judge(model, tokenizer, rows, batch_size):
    """(what the model writes after each row, the share of it that is right)."""
    model.eval()
    found = []
    for start in range(0, len(rows), batch_size):
        part = [question(rows[i]) for i in range(start, min(start + batch_size, len(rows)))]
        batch = tokenizer(part, padding=True, return_tensors="pt").to(DEVICE)
        ids = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        new = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip() for text in new]
    return found, sum(text == row["answer"] for text, row in zip(found, rows, strict=True)) / len(rows)


def main():
    args = arguments(__doc__, REAL, TINY)
    if args.tiny:
        tiny_base(args.model)
    train_rows, test_rows = load_rows(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    loader = DataLoader(train_rows, args.batch_size, shuffle=True, collate_fn=make_collate(tokenizer))

    def make_base():
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE)

    start = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": PROMPT, "tokenizer_name_or_path": str(args.model)}
    config = pyadapt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, **start)  # PROMPT has 8 or more
    model = pyadapt.wrap(make_base(), config)
    model.print_trainable_parameters()

    _, before = judge(model, tokenizer, test_rows, args.batch_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for batch in loader:
            loss = model(**batch.to(DEVICE)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}")
    found, after = judge(model, tokenizer, test_rows, args.batch_size)
    model.save_pretrained(args.output)

    # The adapter over a fresh base, as a user of it would load it.
    fresh = pyadapt.load(make_base(), args.output)
    again, _ = judge(fresh, tokenizer, test_rows, args.batch_size)
    assert again == found, "the loaded adapter writes otherwise than the trained one"
    print(f"{question(test_rows[0])} -> {found[0]}")
    report("accuracy", before, after, args.output)


if __name__ == "__main__":
    main()
