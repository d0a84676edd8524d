"""Prefix tuning of T5, mT5 or BART: sentiment written as a word, with transformers' Seq2SeqTrainer.

Only keys and values before each attention layer are trained; the model stays frozen, and `generate` works as before.

    python examples/prefix_tuning_seq2seq.py --tiny        offline, seconds
    python examples/prefix_tuning_seq2seq.py               t5-large on zeroshot/twitter-financial-news-sentiment, a GPU
    python examples/prefix_tuning_seq2seq.py --model google/mt5-base
"""

from __future__ import annotations

import random

import numpy as np
import torch
from common import DEVICE, arguments, hub_rows, report, word_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments

import pyadapt

REAL = {"model": "google-t5/t5-large", "dataset": "zeroshot/twitter-financial-news-sentiment"}
REAL |= {"epochs": 5, "batch_size": 8, "lr": 1e-2}
TINY = {"epochs": 6, "batch_size": 32, "lr": 5e-2}
LABELS = ["negative", "positive", "neutral"]  # the dataset's 0 bearish, 1 bullish, 2 neutral
TINY_WORDS = {
    "negative": ["loss", "fell", "lawsuit", "weak"],
    "positive": ["profit", "rose", "record", "strong"],
    "neutral": ["the", "company", "shares", "report", "on", "monday"],
}
TINY_TOPICS = ["bank", "oil", "retail"]


def tiny_rows(count, seed):
    """Texts of neutral words, with two of one sentiment and the name of a topic."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label, topic = LABELS[number % 3], draw.choice(TINY_TOPICS)
        words = draw.choices(TINY_WORDS["neutral"], k=4) + draw.choices(TINY_WORDS[label], k=2) + [topic]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "answer": label, "topic": topic})
    return rows


def tiny_base(folder):
    """A tiny T5, trained to answer a text with its topic, at times with its sentiment; and its tokenizer.

    A prefix steers what a model knows; random weights know nothing.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    rows = tiny_rows(768, seed=0)
    tokenizer = word_tokenizer([*(row["text"] for row in rows), *LABELS], end=" </s>")
    tokenizer.save_pretrained(folder)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = random.Random(0)
    for _ in range(150):
        part = draw.sample(rows, 64)
        batch = tokenizer([row["text"] for row in part], return_tensors="pt")
        answers = [row[draw.choice(["topic", "topic", "answer"])] for row in part]
        model(**batch, labels=tokenizer(answers, return_tensors="pt")["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def load_rows(args):
    """(rows to train on, rows to judge by); a row has a text and the answer to it, a word."""
    if args.tiny:
        return tiny_rows(384, seed=1), tiny_rows(96, seed=2)
    parts = hub_rows(args.dataset).map(lambda row: {"answer": LABELS[row["label"]]})
    return parts["train"], parts["validation"]


def main():
    args = arguments(__doc__, REAL, TINY)
    if args.tiny:
        tiny_base(args.model)
    train_rows, test_rows = load_rows(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def collate(rows):
        batch = tokenizer(
            [row["text"] for row in rows], truncation=True, max_length=128, padding=True, return_tensors="pt"
        )
        answers = tokenizer([row["answer"] for row in rows], padding=True, return_tensors="pt")
        batch["labels"] = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        return batch

    def texts(ids):
        ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def accuracy(result):
        pairs = zip(texts(result.predictions), texts(result.label_ids), strict=True)
        return {"accuracy": np.mean([found == right for found, right in pairs])}

    def make_base():
        return AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE)

    model = pyadapt.wrap(make_base(), pyadapt.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=20))
    model.print_trainable_parameters()

    # A wrapped model is the same transformers model: Trainer takes it as it is, and judges it by what it generates.
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(args.output),
            remove_unused_columns=False,  # the collator reads the texts, which the model does not know
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.lr,
            predict_with_generate=True,
            generation_max_length=8,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=args.tiny,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        data_collator=collate,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(args.output)

    # The adapter over a fresh base, as a user of it would load it.
    fresh = pyadapt.load(make_base(), args.output)
    batch = collate([test_rows[i] for i in range(16)]).to(DEVICE)
    batch.pop("labels")
    found = texts(fresh.generate(**batch, max_length=8).cpu().numpy())
    again = texts(model.eval().generate(**batch, max_length=8).cpu().numpy())
    assert found == again, "the loaded adapter writes otherwise than the trained one"
    print(f"{test_rows[0]['text']!r} -> {found[0]!r}")
    report("accuracy", before, after, args.output)


if __name__ == "__main__":
    main()
