"""One tiny model a family: the real transformers class, random weights from a fixed seed, no dropout.

Sizes are odd on purpose where the architecture lets them be: kernels have edges.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 67
# What transformers calls the cache among arguments and outputs.
_VERSION = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))
CACHE = "cache" if _VERSION >= (5, 24) else "past_key_values"


@dataclass(frozen=True)
class Family:
    """One row of the model table.

    Attributes:
        make: builds the model (the caller sets the seed).
        task: the task type of its adapters.
        targets: leaf names of the layers that `target_modules` left out means.
        target_count: how many layers those names are.
        all_linear_count: how many layers "all-linear" means.
        head: the module that the task trains whole, if it has one.
    """

    make: Callable[[], nn.Module]
    task: str | None
    targets: tuple[str, ...]
    target_count: int
    all_linear_count: int
    head: str | None = None


def _decoder_options() -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder_options(), num_key_value_heads=2))


def tied_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama whose head shares its weight with the input embedding, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = {**_decoder_options(), "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**options, num_key_value_heads=2)).to(dtype).eval()


def _olmo() -> nn.Module:
    """In no table of defaults: its targets are found by structure."""
    from transformers import OlmoConfig, OlmoForCausalLM

    return OlmoForCausalLM(OlmoConfig(**_decoder_options()))


def _gpt2() -> nn.Module:
    """Conv1D layers, and a head that shares its weight with the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=24, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=24, d_kv=6, d_ff=36, num_layers=2, num_heads=4, vocab_size=VOCABULARY, dropout_rate=0.0,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, image_size=12, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, "CAUSAL_LM", ("q_proj", "v_proj"), 4, 14),
    "gpt2": Family(_gpt2, "CAUSAL_LM", ("c_attn",), 2, 8),
    "t5": Family(_t5, "SEQ_2_SEQ_LM", ("q", "v"), 12, 36),
    "bert": Family(_bert, "SEQ_CLS", ("query", "value"), 4, 13, "classifier"),
    "vit": Family(_vit, "SEQ_CLS", ("q_proj", "v_proj"), 4, 12, "classifier"),
    "olmo": Family(_olmo, "CAUSAL_LM", ("q_proj", "v_proj"), 4, 14),
}
ALL = tuple(FAMILIES)


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model of one family, in evaluation mode."""
    torch.manual_seed(seed)
    model = FAMILIES[name].make()
    with torch.no_grad():
        for parameter in model.parameters():
            # Some classes start biases at zero and norms at one: faults in either would not show.
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def model_batch(name: str, seed: int = 0, rows: int = 2, tokens: int = 5) -> dict[str, Tensor]:
    """Inputs and labels for one step of the family."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(rows, 3, 12, 12, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, 3, (rows,), generator=generator)}
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "bert":
        return {**batch, "labels": torch.randint(0, 3, (rows,), generator=generator)}
    if name == "t5":
        return {**batch, "labels": torch.randint(3, VOCABULARY, (rows, tokens - 1), generator=generator)}
    return {**batch, "labels": ids}


class PlainNet(nn.Module):
    """A module that transformers never saw."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 9, bias=False))
        self.norm = nn.LayerNorm(9)
        self.classifier = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.encoder(x)))


def plain_module(seed: int = 0) -> PlainNet:
    """A seeded `PlainNet` in evaluation mode."""
    torch.manual_seed(seed)
    return PlainNet().eval()
