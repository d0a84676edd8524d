"""LoRA on a vision transformer (ViT or Swin) for image classification, with transformers' Trainer.

The attention gets LoRA; the classifier is new: it is trained whole and saved beside the adapter (`modules_to_save`).

    python examples/image_classification.py --tiny        offline, seconds
    python examples/image_classification.py               google/vit-base-patch16-224-in21k on ethz/food101, a GPU
    python examples/image_classification.py --model microsoft/swin-tiny-patch4-window7-224
"""

from __future__ import annotations

import numpy as np
import torch
from common import arguments, hub_rows, report
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

import pyadapt

REAL = {"model": "google/vit-base-patch16-224-in21k", "dataset": "ethz/food101"}
REAL |= {"epochs": 5, "batch_size": 128, "lr": 5e-3}
TINY = {"epochs": 8, "batch_size": 16, "lr": 1e-2}
TINY_CLASSES = ["rows", "columns", "chequers"]


def tiny_base(folder):
    """A random ViT without a classifier, and the image processor that goes with it."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=24, patch_size=6, initializer_range=0.1, **sizes)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)


def tiny_rows(count, seed):
    """Noisy images with stripes along rows, along columns, or both; each starts anywhere in the pattern."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = number % len(TINY_CLASSES)
        down, across = np.indices((24, 24)) + random.integers(0, 12, size=(2, 1, 1))
        pattern = [down // 3 % 2, across // 3 % 2, (down // 3 + across // 3) % 2][label]
        pixels = 255 * pattern[..., None] * random.uniform(0.5, 1, 3) + random.normal(0, 20, (24, 24, 3))
        rows.append({"image": Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "label": label})
    return rows


def load_rows(args):
    """(rows to train on, rows to judge by, names of the classes); a row has an image and a label."""
    if args.tiny:
        return tiny_rows(192, seed=1), tiny_rows(96, seed=2), TINY_CLASSES
    parts = hub_rows(args.dataset)
    held_out = parts["validation"] if "validation" in parts else parts["test"]
    return parts["train"], held_out, parts["train"].features["label"].names


def make_base(args, classes):
    """The pretrained model with a new classifier for our classes."""
    return AutoModelForImageClassification.from_pretrained(
        args.model,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
        ignore_mismatched_sizes=True,  # a checkpoint with a classifier of its own: it is replaced
    )


def main():
    args = arguments(__doc__, REAL, TINY)
    if args.tiny:
        tiny_base(args.model)
    train_rows, test_rows, classes = load_rows(args)
    processor = AutoImageProcessor.from_pretrained(args.model)

    def collate(rows):
        images = [row["image"].convert("RGB") for row in rows]
        return {**processor(images, return_tensors="pt"), "labels": torch.tensor([row["label"] for row in rows])}

    # Without target_modules the queries and values of every attention layer, whatever the model calls them.
    config = pyadapt.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, modules_to_save=["classifier"])
    model = pyadapt.wrap(make_base(args, classes), config)
    model.print_trainable_parameters()

    # A wrapped model is the same transformers model, so Trainer takes it as it is. Only the adapter is ever saved.
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            remove_unused_columns=False,  # the collator reads the images, which the model does not know
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.lr,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=args.tiny,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        data_collator=collate,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()},
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(args.output)

    # The adapter over a fresh base, as a user of it would load it.
    fresh = pyadapt.load(make_base(args, classes), args.output).to(model.device)
    batch = {key: value.to(model.device) for key, value in collate([test_rows[i] for i in range(16)]).items()}
    with torch.no_grad():
        same = torch.equal(model.eval()(**batch).logits.argmax(-1), fresh(**batch).logits.argmax(-1))
    assert same, "the loaded adapter predicts otherwise than the trained one"
    report("accuracy", before, after, args.output)


if __name__ == "__main__":
    main()
