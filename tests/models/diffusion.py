"""Tiny random parts of Stable Diffusion: diffusers' UNet and transformers' CLIP text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS, WIDTH = 7, 16


def unet(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A UNet of two levels, one with attention, whose context is `WIDTH` wide."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **options}).to(dtype).eval()


def unet_inputs(dtype: torch.dtype = torch.float32, rows: int = 2) -> dict[str, Tensor]:
    """Keyword arguments for a call of `unet()`."""
    generator = torch.Generator().manual_seed(5)
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(rows, TOKENS, WIDTH, generator=generator).to(dtype),
    }


def text_encoder(layers: int = 2, width: int = WIDTH, projected: bool = False) -> Any:
    """CLIP's text encoder, with or without the projection that SDXL's second one has."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=12,
        bos_token_id=48,
        eos_token_id=49,
        pad_token_id=49,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def token_ids(rows: int = 2) -> Tensor:
    """Token ids for `text_encoder()`."""
    ids = torch.randint(0, 48, (rows, TOKENS), generator=torch.Generator().manual_seed(6))
    ids[:, 0], ids[:, -1] = 48, 49
    return ids
