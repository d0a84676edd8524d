"""Four methods on one sequence classifier: P-tuning, LoRA, prefix tuning, prompt tuning; a table closes the run.

Each is trained in turn on the same base: `wrap`, train, save, `unwrap`, and the base is what it was before.

    python examples/sequence_classification.py --tiny        offline, seconds
    python examples/sequence_classification.py               roberta-large on nyu-mll/glue (mrpc), a GPU
"""

from __future__ import annotations

import random
import time

import torch
from common import DEVICE, arguments, file_size, hub_rows, word_tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pyadapt

REAL = {"model": "FacebookAI/roberta-large", "dataset": "nyu-mll/glue", "epochs": 10, "batch_size": 32, "lr": None}
TINY = {"epochs": 12, "batch_size": 32, "lr": 5e-3}
TASK = {"task_type": "SEQ_CLS"}  # the classifier is new: it is trained whole and saved beside the adapter
VOCAB = {**TASK, "prompt_tuning_init": "SAMPLE_VOCAB"}  # the prompt starts as words drawn from the vocabulary
METHODS = {  # name: (configuration, learning rate if --lr does not say)
    "P-tuning": (pyadapt.PromptEncoderConfig(**TASK, num_virtual_tokens=20, encoder_hidden_size=128), 1e-3),
    "LoRA": (pyadapt.LoraConfig(**TASK, r=8, lora_alpha=16, lora_dropout=0.1), 3e-4),
    "prefix tuning": (pyadapt.PrefixTuningConfig(**TASK, num_virtual_tokens=20), 5e-3),
    "prompt tuning": (pyadapt.PromptTuningConfig(**VOCAB, num_virtual_tokens=10), 1e-3),
}
TINY_WORDS = ["the", "bank", "sold", "its", "shares", "in", "may", "to", "a", "rival"]


def tiny_base(folder):
    """A tiny RoBERTa that has learned which words a text holds (a prompt steers what a model knows); its tokenizer."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    words = [*TINY_WORDS, "not", "never"]
    tokenizer = word_tokenizer(words, start="<s> ", end=" </s>", pair=" </s> $B </s>")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=80, initializer_range=0.1, **sizes)
    config.pad_token_id, config.num_labels = tokenizer.pad_token_id, len(words)
    model = RobertaForSequenceClassification(config).to(DEVICE)
    draw, batches = random.Random(0), []
    for length in draw.choices(range(8, 50), k=250):  # places behind virtual tokens are to be known, too
        texts = [draw.choices(draw.sample(words, 6), k=length) for _ in range(64)]
        batches.append(tokenizer([" ".join(text) for text in texts], return_tensors="pt"))
        batches[-1]["labels"] = torch.tensor([[float(word in text) for word in words] for text in texts])
    train(model, batches, epochs=1, lr=5e-3)
    model.config.num_labels, model.config.problem_type = 2, None
    model.roberta.save_pretrained(folder)


def tiny_rows(count, seed):
    """Pairs: the second sentence says the first one in another order (1), or denies it (0)."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.sample(TINY_WORDS, 6)
        others = [*words[:4], *(words[4:] if number % 2 else ["not", "never"])]
        draw.shuffle(others)
        rows.append({"sentence1": " ".join(words), "sentence2": " ".join(others), "label": number % 2})
    return rows


def load_rows(args):
    """(rows to train on, rows to judge by); a row has two sentences, and a label: whether they mean the same."""
    if args.tiny:
        return tiny_rows(320, seed=1), tiny_rows(128, seed=2)
    parts = hub_rows(args.dataset, "mrpc")
    return parts["train"], parts["validation"]


def train(model, loader, epochs, lr):
    """Seconds a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    start = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for batch in loader:
            loss = model(**batch.to(DEVICE)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}")
    return (time.perf_counter() - start) / steps


@torch.no_grad()
def predict(model, loader):
    model.eval()
    return torch.cat([model(**batch.to(DEVICE)).logits.argmax(-1).cpu() for batch in loader])


def main():
    args = arguments(__doc__, REAL, TINY)
    if args.tiny:
        tiny_base(args.model)
    train_rows, test_rows = load_rows(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def collate(rows):
        pairs = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
        batch = tokenizer(*pairs, truncation=True, max_length=256, padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    train_loader = DataLoader(train_rows, args.batch_size, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(test_rows, args.batch_size, collate_fn=collate)
    right = torch.tensor([row["label"] for row in test_rows])

    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2).to(DEVICE)
    table = []
    for name, (config, lr) in METHODS.items():
        print(f"--- {name}")
        folder = args.output / name.replace(" ", "-")
        torch.manual_seed(0)
        model = pyadapt.wrap(model, config)
        model.print_trainable_parameters()
        trained, total = model.get_nb_trainable_parameters()
        before = predict(model, test_loader)
        seconds = train(model, train_loader, args.epochs, args.lr or lr)
        after = predict(model, test_loader)
        model.save_pretrained(folder)

        # The base again, and the adapter as a user of it would load it.
        model = pyadapt.load(pyadapt.unwrap(model), folder)
        assert torch.equal(predict(model, test_loader), after), f"the loaded {name} predicts otherwise"
        model = pyadapt.unwrap(model)

        before, after = ((found == right).double().mean().item() for found in (before, after))
        print(f"accuracy with {name}: {before:.3f} before training, {after:.3f} after")
        table.append(
            (name, f"{trained:,}", f"{trained / total:.3%}", f"{seconds:.4f}", file_size(folder), f"{after:.3f}")
        )

    print()
    for row in [("method", "trained", "share", "seconds a step", "file", "accuracy"), *table]:
        print("{:<15}{:>12}{:>10}{:>16}{:>10}{:>10}".format(*row))


if __name__ == "__main__":
    main()
