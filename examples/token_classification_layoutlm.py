"""LoRA on LayoutLM for token classification: what each word on a scanned form is, from the word and its place.

A plain training loop. The classifier is new; task_type="TOKEN_CLS" has it trained whole and saved beside the adapter.

    python examples/token_classification_layoutlm.py --tiny        offline, seconds
    python examples/token_classification_layoutlm.py               microsoft/layoutlm-base-uncased on nielsr/funsd
"""

from __future__ import annotations

import random

import torch
from common import DEVICE, arguments, hub_rows, report, word_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForTokenClassification, AutoTokenizer

import pyadapt

REAL = {"model": "microsoft/layoutlm-base-uncased", "dataset": "nielsr/funsd"}
REAL |= {"epochs": 100, "batch_size": 8, "lr": 3e-3}
TINY = {"epochs": 10, "batch_size": 16, "lr": 1e-2}
TINY_TAGS = ["other", "header", "question", "answer"]
TINY_WORDS = ["name", "date", "total", "city", "order", "phone", "page", "code"]


def tiny_base(folder):
    """A random LayoutLM without a classifier, and a tokenizer of a few words."""
    from transformers import LayoutLMConfig, LayoutLMModel

    tokenizer = word_tokenizer([*TINY_WORDS, "---"], start="<s> ", end=" </s>")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = LayoutLMConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, **sizes)
    LayoutLMModel(config).save_pretrained(folder)


def tiny_rows(count, seed):
    """Forms: headers at the top, questions on the left, answers on the right; a rule (---) is nothing anywhere."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        row = {"words": [], "bboxes": [], "ner_tags": []}
        for _ in range(12):
            word, x, y = draw.choice([*TINY_WORDS, "---", "---"]), draw.choice([100, 550]), 80 * draw.randrange(12)
            row["words"].append(word)
            row["bboxes"].append([x, y, x + 300, y + 40])
            row["ner_tags"].append(0 if word == "---" else 1 if y < 240 else 2 if x == 100 else 3)
        rows.append(row)
    return rows


def load_rows(args):
    """(rows to train on, rows to judge by, names of the tags); boxes are in thousandths of the page."""
    if args.tiny:
        return tiny_rows(160, seed=1), tiny_rows(64, seed=2), TINY_TAGS
    parts = hub_rows(args.dataset, revision="refs/convert/parquet")  # main holds a script, which is no longer run
    return parts["train"], parts["test"], parts["train"].features["ner_tags"].feature.names


def make_collate(tokenizer):
    """Rows to a batch: each token gets the box of its word; the first token of a word carries the word's tag."""

    def collate(rows):
        words = [row["words"] for row in rows]
        batch = tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=512, padding=True, return_tensors="pt"
        )
        batch["bbox"] = torch.zeros(*batch["input_ids"].shape, 4, dtype=torch.long)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)  # the loss passes -100 over
        for i, row in enumerate(rows):
            before = None
            for j, word in enumerate(batch.word_ids(i)):  # None: a special token
                if word is not None:
                    batch["bbox"][i, j] = torch.tensor(row["bboxes"][word])
                    if word != before:
                        batch["labels"][i, j] = row["ner_tags"][word]
                before = word
        return batch

    return collate


@torch.no_grad()
def predict(model, loader):
    """(the tag of each word, the right one), over all batches."""
    model.eval()
    found, right = [], []
    for batch in loader:
        batch = batch.to(DEVICE)
        tags = model(**batch).logits.argmax(-1)
        is_word = batch["labels"] != -100
        found.append(tags[is_word])
        right.append(batch["labels"][is_word])
    return torch.cat(found), torch.cat(right)


def accuracy(predictions):
    found, right = predictions
    return (found == right).float().mean().item()


def main():
    args = arguments(__doc__, REAL, TINY)
    if args.tiny:
        tiny_base(args.model)
    train_rows, test_rows, tags = load_rows(args)
    collate = make_collate(AutoTokenizer.from_pretrained(args.model))
    train_loader = DataLoader(train_rows, args.batch_size, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(test_rows, args.batch_size, collate_fn=collate)

    def make_base():
        return AutoModelForTokenClassification.from_pretrained(args.model, num_labels=len(tags)).to(DEVICE)

    config = pyadapt.LoraConfig(task_type="TOKEN_CLS", r=16, lora_alpha=16, lora_dropout=0.1, bias="all")
    model = pyadapt.wrap(make_base(), config)
    model.print_trainable_parameters()

    before = accuracy(predict(model, test_loader))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    steps = args.epochs * len(train_loader)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for batch in train_loader:
            loss = model(**batch.to(DEVICE)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(train_loader):.3f}")
    after = predict(model, test_loader)
    model.save_pretrained(args.output)

    # The adapter over a fresh base, as a user of it would load it.
    fresh = pyadapt.load(make_base(), args.output)
    assert torch.equal(predict(fresh, test_loader)[0], after[0]), (
        "the loaded adapter predicts otherwise than the trained one"
    )
    report("accuracy", before, accuracy(after), args.output)


if __name__ == "__main__":
    main()
