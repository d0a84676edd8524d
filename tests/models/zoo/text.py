"""Rows of models that read text, and of one that listens to speech."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .row import LABELS, ROWS, TOKENS, VOCABULARY, Batch, Row

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
# Where half or a quarter of a head is rotated, `hidden_size` is 32: that has to be an even number of features.
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 6}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "intermediate_size": 40}
_T5 = {"d_model": 24, "d_kv": 6, "d_ff": 36, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_SEQ2SEQ = {
    "d_model": 24,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))},
    "encoder_ffn_dim": 36,
    "decoder_ffn_dim": 36,
    "dropout": 0.0,
}
_DISENTANGLED = {
    **_SIZES,
    **_NO_DROPOUT,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 8,
}

# What transformers calls an architecture -> what the page calls it, and the options of its configuration.
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("GPT-2", {**_GPT, "resid_pdrop": 0.0, "classifier_dropout": 0.0}),
    "Bloom": ("BLOOM", {"hidden_size": 24, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "OPT": ("OPT", {**_SIZES, "ffn_dim": 36, "word_embed_proj_dim": 24, "dropout": 0.0}),
    "GPTNeo": (
        "GPT-Neo",
        {
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 32,
            **dict.fromkeys(("resid_dropout", "embed_dropout", "attention_dropout", "classifier_dropout"), 0.0),
        },
    ),
    "GPTJ": ("GPT-J", {**_GPT, "resid_pdrop": 0.0, "rotary_dim": 4, "tie_word_embeddings": False}),
    "GPTNeoX": (
        "GPT-NeoX",
        {**_SIZES, "hidden_size": 32, "hidden_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0},
    ),
    "Llama": ("Llama", _GROUPED),
    "Mistral": ("Mistral", {**_GROUPED, "sliding_window": 8}),
    "Qwen2": ("Qwen2", _GROUPED),
    "Qwen3": ("Qwen3", _GROUPED),
    "Gemma": ("Gemma", {**_GROUPED, "num_key_value_heads": 1}),
    "Phi": ("Phi", {**_SIZES, "hidden_size": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}),
    "Olmo": ("OLMo", _SIZES),
    # Rows of a multiple of 16 bytes: torch's grouped_mm takes no others.
    "Mixtral": ("Mixtral", {**_EXPERTS, "num_local_experts": 4}),
    "Qwen3Moe": ("Qwen3-MoE", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 40, "mlp_only_layers": [0]}),
    "T5": ("T5", {**_T5, "feed_forward_proj": "relu", "decoder_start_token_id": 0}),
    "MT5": ("mT5 (MT0, T0)", {**_T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}),
    "Bart": ("BART", {**_SEQ2SEQ, "max_position_embeddings": 32, "decoder_start_token_id": 2}),
    "Whisper": (
        "Whisper",
        {
            **_SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 6,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
        },
    ),
    "Bert": ("BERT", {**_SIZES, **_NO_DROPOUT}),
    "Roberta": ("RoBERTa", {**_SIZES, **_NO_DROPOUT}),
    "Deberta": ("DeBERTa", _DISENTANGLED),
    "DebertaV2": ("DeBERTa-v2", {**_DISENTANGLED, "position_buckets": 4, "share_att_key": True}),
    "LayoutLM": ("LayoutLM", {**_SIZES, **_NO_DROPOUT, "max_2d_position_embeddings": 32}),
}


def _make(architecture: str, suffix: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        options = {**_TOKENS, **_ARCHITECTURES[architecture][1], **more}
        model_class = getattr(transformers, architecture + suffix)
        return model_class(getattr(transformers, f"{architecture}Config")(**options))

    return make


def _ids(generator: torch.Generator, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, tokens), generator=generator)


def _text(generator: torch.Generator) -> Batch:
    ids = _ids(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _causal(generator: torch.Generator) -> Batch:
    batch = _text(generator)
    return {**batch, "labels": batch["input_ids"]}


def _seq2seq(generator: torch.Generator) -> Batch:
    return {**_text(generator), "labels": _ids(generator, TOKENS - 1)}


def _speech(generator: torch.Generator) -> Batch:
    features = torch.randn(ROWS, 8, 12, generator=generator)
    return {"input_features": features, "labels": _ids(generator, TOKENS - 1)}


def _sequence(generator: torch.Generator) -> Batch:
    return {**_text(generator), "labels": torch.randint(0, LABELS, (ROWS,), generator=generator)}


def _tokens(generator: torch.Generator) -> Batch:
    return {**_text(generator), "labels": torch.randint(0, LABELS, (ROWS, TOKENS), generator=generator)}


def _layout(generator: torch.Generator) -> Batch:
    """Each token has the box that it lies in: left, top, right, bottom."""
    corner = torch.randint(0, 15, (ROWS, TOKENS, 2), generator=generator)
    size = torch.randint(0, 15, (ROWS, TOKENS, 2), generator=generator)
    return {**_tokens(generator), "bbox": torch.cat([corner, corner + size], dim=-1)}


def _spans(generator: torch.Generator) -> Batch:
    start, length = torch.randint(0, 2, (2, ROWS), generator=generator)
    return {**_text(generator), "start_positions": start, "end_positions": start + length}


def _features(generator: torch.Generator) -> Batch:
    return {**_text(generator), "target": torch.randn(ROWS, 1, 24, generator=generator)}


_SUFFIXES = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}
_DECODERS = [
    "GPT2", "Bloom", "OPT", "GPTNeo", "GPTJ", "GPTNeoX", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi", "Olmo",
    "Mixtral", "Qwen3Moe",
]  # fmt: skip
_ENCODERS = ["Bert", "Roberta", "Deberta", "DebertaV2"]
# Classes that transformers has not, for rows that are named in every list of models.
_MISSING = {("TOKEN_CLS", "OPT"), ("TOKEN_CLS", "GPTJ")}


def _row(task: str, architecture: str, draw: Callable[[torch.Generator], Batch]) -> Row:
    generates = task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    kind = "encoder-decoder" if task == "SEQ_2_SEQ_LM" else "decoder" if architecture in _DECODERS else "encoder"
    suffix = "LMHeadModel" if (task, architecture) == ("CAUSAL_LM", "GPT2") else _SUFFIXES[task]
    more = {} if generates or task == "FEATURE_EXTRACTION" else {"num_labels": 2 if "ANS" in task else LABELS}
    return Row(
        section=task,
        name=_ARCHITECTURES[architecture][0],
        model_class=architecture + suffix,
        kind="speech" if architecture == "Whisper" else kind,
        make=_make(architecture, suffix, **more),
        draw=draw,
        task=task,
        generates=generates,
        # As in its usual example: PEFT's model for the task would be called with the ids of a text.
        layer_options={"task_type": None} if architecture == "Whisper" else {},
        missing=(task, architecture) in _MISSING,
    )


TEXT = [
    *(_row("CAUSAL_LM", name, _causal) for name in _DECODERS),
    *(_row("SEQ_2_SEQ_LM", name, _seq2seq) for name in ("T5", "MT5", "Bart")),
    _row("SEQ_2_SEQ_LM", "Whisper", _speech),
    *(_row("SEQ_CLS", name, _sequence) for name in (*_ENCODERS, *_DECODERS[:5])),
    *(_row("TOKEN_CLS", name, _tokens) for name in (*_ENCODERS, *_DECODERS[:5])),
    _row("TOKEN_CLS", "LayoutLM", _layout),
    *(_row("QUESTION_ANS", name, _spans) for name in (*_ENCODERS, *_DECODERS[:5])),
    *(_row("FEATURE_EXTRACTION", name, _features) for name in (*_ENCODERS, "GPT2")),
]
