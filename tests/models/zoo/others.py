"""Rows of models that see pictures or make them, and of one that no library knows."""

from __future__ import annotations

import torch
from torch import nn

from .. import diffusion
from ..families import plain_module
from .row import LABELS, ROWS, Batch, Row

_SIDE = 16


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, image_size=_SIDE,
        patch_size=4, num_labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _swin() -> nn.Module:
    """Two stages; the second block of each shifts its windows."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=_SIDE, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=2, num_labels=LABELS,
        drop_path_rate=0.0,
    )  # fmt: skip
    return SwinForImageClassification(config)


def _segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=LABELS, drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config)


def _pixels(generator: torch.Generator) -> Batch:
    return {"pixel_values": torch.randn(ROWS, 3, _SIDE, _SIDE, generator=generator)}


def _image(generator: torch.Generator) -> Batch:
    return {**_pixels(generator), "labels": torch.randint(0, LABELS, (ROWS,), generator=generator)}


def _segments(generator: torch.Generator) -> Batch:
    return {**_pixels(generator), "labels": torch.randint(0, LABELS, (ROWS, _SIDE, _SIDE), generator=generator)}


def _noise(generator: torch.Generator) -> Batch:
    return {**diffusion.unet_inputs(rows=ROWS), "target": torch.randn(ROWS, 4, 8, 8, generator=generator)}


def _caption(generator: torch.Generator) -> Batch:
    target = torch.randn(ROWS, 1, diffusion.WIDTH, generator=generator)
    ids = diffusion.token_ids(rows=ROWS)
    # Shorter than the model's positions, which leaves some for a prompt.
    return {"input_ids": torch.cat([ids[:, :3], ids[:, -1:]], dim=1), "target": target}


def _numbers(generator: torch.Generator) -> Batch:
    return {
        "x": torch.randn(ROWS, 7, generator=generator),
        "target": torch.randn(ROWS, 3, generator=generator),
    }


# As in the usual examples: no task type, and the head is named.
_CLASSIFIER = {"modules_to_save": ["classifier"]}

OTHERS = [
    Row("Image classification", "ViT", "ViTForImageClassification", "vision", _vit, _image, options=_CLASSIFIER),
    Row("Image classification", "Swin", "SwinForImageClassification", "vision", _swin, _image, options=_CLASSIFIER),
    Row(
        "Semantic segmentation",
        "SegFormer",
        "SegformerForSemanticSegmentation",
        "vision",
        _segformer,
        _segments,
        # It has the running means of a batch norm, which are saved with it.
        options={"modules_to_save": ["decode_head"]},
    ),
    Row("Text to image", "Stable Diffusion's UNet", "UNet2DConditionModel", "diffusion", diffusion.unet, _noise),
    Row("Text to image", "its text encoder", "CLIPTextModel", "encoder", diffusion.text_encoder, _caption),
    Row(
        "No library",
        "a plain `nn.Module`",
        "PlainNet",
        "plain",
        plain_module,
        _numbers,
        options=_CLASSIFIER,
        layer_options={"target_modules": ["0", "2"]},
    ),
]
