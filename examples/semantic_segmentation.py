"""LoRA on SegFormer for semantic segmentation: a class for each pixel; mean IoU before and after.

The attention gets LoRA; the decode head is new: it is trained whole and saved beside the adapter (`modules_to_save`).

    python examples/semantic_segmentation.py --tiny        offline, seconds
    python examples/semantic_segmentation.py               nvidia/mit-b0 on segments/sidewalk-semantic, a GPU
    python examples/semantic_segmentation.py --dataset zhoubolei/scene_parse_150
"""

from __future__ import annotations

import numpy as np
import torch
from common import DEVICE, arguments, hub_rows, report
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

import pyadapt

REAL = {"model": "nvidia/mit-b0", "dataset": "segments/sidewalk-semantic", "epochs": 50, "batch_size": 8, "lr": 5e-4}
TINY = {"epochs": 6, "batch_size": 8, "lr": 1e-2}
NOT_COUNTED = 255  # pixels of this class are left out of the loss and of the metric


def tiny_base(folder):
    """A random SegFormer encoder (what nvidia/mit-b0 is), and the image processor that goes with it."""
    from transformers import SegformerConfig, SegformerImageProcessorPil, SegformerModel

    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "decoder_hidden_size": 32}
    stages = {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
    config = SegformerConfig(**sizes, **stages, mlp_ratios=[2, 2], initializer_range=0.2, drop_path_rate=0.0)
    SegformerModel(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)


def tiny_rows(count, seed):
    """Noisy pictures of sky (class 0) over ground (1), and a bright box (2) that stands anywhere."""
    random = np.random.default_rng(seed)
    colours = np.array([[90, 140, 200], [110, 100, 70], [220, 60, 60]])
    rows = []
    for _ in range(count):
        label = np.zeros((48, 48), np.uint8)
        label[random.integers(16, 32) :] = 1
        top, left = random.integers(0, 32, 2)
        label[top : top + 16, left : left + 16] = 2
        pixels = colours[label] + random.normal(0, 30, (48, 48, 3))
        rows.append({"image": Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "label": Image.fromarray(label)})
    return rows


def load_rows(args):
    """(rows to train on, rows to judge by, number of classes, whether class 0 means "no class")."""
    if args.tiny:
        return tiny_rows(64, seed=1), tiny_rows(24, seed=2), 3, False
    if "scene_parse_150" in args.dataset:
        parts = hub_rows(args.dataset, data_dir="scene_parsing", revision="refs/convert/parquet")
        parts = parts.rename_column("annotation", "label")
        return parts["train"], parts["validation"], 150, True
    rows = hub_rows(args.dataset, split="train").rename_column("pixel_values", "image")
    parts = rows.train_test_split(test_size=0.2, seed=1)
    return parts["train"], parts["test"], 35, False


@torch.no_grad()
def predict(model, loader):
    """(the class of each pixel, the right one) for each batch, in the labels' resolution."""
    model.eval()
    predictions = []
    for batch in loader:
        logits = model(batch["pixel_values"].to(DEVICE)).logits  # (B, classes, H / 4, W / 4)
        logits = torch.nn.functional.interpolate(logits, batch["labels"].shape[-2:], mode="bilinear")
        predictions.append((logits.argmax(1).to("cpu", torch.uint8), batch["labels"].to(torch.uint8)))
    return predictions


def mean_iou(predictions, classes):
    """Mean over the classes of |found and right| / |found or right|; a class that never occurs is left out."""
    pairs = torch.zeros(classes * classes, dtype=torch.double)
    for found, right in predictions:
        counted = right != NOT_COUNTED
        pairs += torch.bincount(right[counted].long() * classes + found[counted], minlength=classes * classes)
    pairs = pairs.view(classes, classes)  # pixels by (right class, found class)
    both, either = pairs.diag(), pairs.sum(0) + pairs.sum(1) - pairs.diag()
    return (both[either > 0] / either[either > 0]).mean().item()


def main():
    args = arguments(__doc__, REAL, TINY)
    if args.tiny:
        tiny_base(args.model)
    train_rows, test_rows, classes, zero_is_none = load_rows(args)
    processor = AutoImageProcessor.from_pretrained(args.model, do_reduce_labels=zero_is_none)

    def collate(rows):
        images, maps = [row["image"].convert("RGB") for row in rows], [row["label"] for row in rows]
        return processor(images, maps, return_tensors="pt")

    train_loader = DataLoader(train_rows, args.batch_size, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(test_rows, args.batch_size, collate_fn=collate)

    def make_base():
        base = AutoModelForSemanticSegmentation.from_pretrained(
            args.model, num_labels=classes, semantic_loss_ignore_index=NOT_COUNTED
        )
        return base.to(DEVICE)

    config = pyadapt.LoraConfig(
        r=32, lora_alpha=32, lora_dropout=0.1, bias="lora_only", modules_to_save=["decode_head"]
    )
    model = pyadapt.wrap(make_base(), config)
    model.print_trainable_parameters()

    before = mean_iou(predict(model, test_loader), classes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for batch in train_loader:
            loss = model(**batch.to(DEVICE)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(train_loader):.3f}")
    after = predict(model, test_loader)
    model.save_pretrained(args.output)

    # The adapter over a fresh base, as a user of it would load it.
    fresh = pyadapt.load(make_base(), args.output)
    for (found, _), (again, _) in zip(after, predict(fresh, test_loader), strict=True):
        assert torch.equal(found, again), "the loaded adapter predicts otherwise than the trained one"
    report("mean IoU", before, mean_iou(after, classes), args.output)


if __name__ == "__main__":
    main()
