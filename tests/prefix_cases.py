"""Tiny models whose attentions know positions in different ways, for the tests of prefix tuning.

Heads of 12 features: 3 times that is a square, and transformers rounds the root of it to fp32 in DeBERTa.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import prefix_reference as reference
import torch
from torch import Tensor, nn

VOCABULARY, POSITIONS, WINDOW = 67, 40, 5
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0}
ENCODER = {
    **{key: value for key, value in DECODER.items() if key not in ("bos_token_id", "eos_token_id")},
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Case:
    """One way of knowing positions.

    Attributes:
        model: name of the class in transformers.
        config: name of that of its configuration.
        options: of the configuration.
        task: the adapter's task.
        attention: path of the self-attention of layer i.
        expected: the reference of one attention.
        exact: whether the implementations of attention compute in fp64 throughout, where they can.
        table: path of a table of learned positions, and the row of it that a text's first position has.
        windowed: whether the reference is to be told `WINDOW`.
        implementations: of attention, that the model has.
    """

    model: str
    config: str
    options: dict[str, Any]
    task: str
    attention: str
    expected: Callable[..., Tensor]
    exact: bool = True
    table: tuple[str, int] | None = None
    windowed: bool = False
    implementations: tuple[str, ...] = ("sdpa", "eager")

    def make(self, seed: int = 0, **options: Any) -> nn.Module:
        """The model, in evaluation mode; its weights are large enough for an attention that tells tokens apart."""
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**self.options, **options})
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        return model.eval()

    def reading(self) -> Callable[..., Tensor]:
        """The reference of one attention, called with a plain module and a `Text`."""
        return functools.partial(self.expected, window=WINDOW) if self.windowed else self.expected

    @property
    def own_forward(self) -> bool:
        """Whether the model has but one implementation of attention, in fp32 or the like."""
        return len(self.implementations) < 2


LLAMA = "model.layers.{}.self_attn"
GPT = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "pad_token_id": 0,
       "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
# peft counts the encoder's layers where it lays out a prefix for the decoder's: as many in both.
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 36, "num_layers": 3, "num_heads": 4, "vocab_size": VOCABULARY,
      "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 11}  # fmt: skip
BART = {"d_model": 48, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "pad_token_id": 0,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36, "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None,
        "decoder_start_token_id": 2, **NO_DROPOUT}  # fmt: skip
WHISPER = {"vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 3, "decoder_layers": 3, "pad_token_id": 0,
           "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36,
           "max_target_positions": POSITIONS, "max_source_positions": 20, "num_mel_bins": 8, "bos_token_id": 1,
           "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
           **NO_DROPOUT}  # fmt: skip
DISENTANGLED = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ONE_FORWARD = ("eager",)

CASES: dict[str, Case] = {
    "llama": Case(
        "LlamaForCausalLM", "LlamaConfig", {**DECODER, "num_key_value_heads": 2}, "CAUSAL_LM", LLAMA, reference.llama
    ),
    "qwen3": Case(
        "Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "num_key_value_heads": 2, "head_dim": 8}, "CAUSAL_LM", LLAMA,
        reference.llama,
    ),
    "mistral": Case(
        "MistralForCausalLM", "MistralConfig", {**DECODER, "num_key_value_heads": 2, "sliding_window": WINDOW},
        "CAUSAL_LM", LLAMA, reference.llama, windowed=True,
    ),
    "neox": Case(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**DECODER, "rotary_pct": 0.5}, "CAUSAL_LM",
        "gpt_neox.layers.{}.attention", reference.neox,
    ),
    "gptj": Case(
        "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, "CAUSAL_LM", "transformer.h.{}.attn",
        reference.gptj, exact=False, implementations=ONE_FORWARD,
    ),
    "gpt2": Case(
        "GPT2LMHeadModel", "GPT2Config", GPT, "CAUSAL_LM", "transformer.h.{}.attn", reference.gpt2,
        table=("transformer.wpe", 0),
    ),
    "gptneo": Case(
        "GPTNeoForCausalLM", "GPTNeoConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "window_size": WINDOW,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": POSITIONS, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0},
        "CAUSAL_LM", "transformer.h.{}.attn.attention", reference.gpt_neo, exact=False, table=("transformer.wpe", 0),
        implementations=ONE_FORWARD,
    ),
    "opt": Case(
        "OPTForCausalLM", "OPTConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "ffn_dim": 36, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "dropout": 0.0, "attention_dropout": 0.0},
        "CAUSAL_LM", "model.decoder.layers.{}.self_attn", reference.opt,
        table=("model.decoder.embed_positions", 2),
    ),
    "bloom": Case(
        "BloomForCausalLM", "BloomConfig",
        # Six heads: four slopes are of one series and two of another.
        {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 6, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2},
        "CAUSAL_LM", "transformer.h.{}.self_attention", reference.bloom, exact=False, implementations=ONE_FORWARD,
    ),
    "t5": Case(
        "T5ForConditionalGeneration", "T5Config", T5, "SEQ_2_SEQ_LM", "decoder.block.{}.layer.0.SelfAttention",
        reference.t5,
    ),
    "t5_encoder": Case(
        "T5EncoderModel", "T5Config", T5, "FEATURE_EXTRACTION", "encoder.block.{}.layer.0.SelfAttention", reference.t5
    ),
    "bart": Case(
        "BartForConditionalGeneration", "BartConfig", BART, "SEQ_2_SEQ_LM", "model.decoder.layers.{}.self_attn",
        reference.opt, table=("model.decoder.embed_positions", 2),
    ),
    # A bias of its own in each layer.
    "umt5": Case(
        "UMT5ForConditionalGeneration", "UMT5Config", T5, "SEQ_2_SEQ_LM", "decoder.block.{}.layer.0.SelfAttention",
        reference.umt5,
    ),
    # Its vectors of positions are made by a formula, from the tokens.
    "m2m100": Case(
        "M2M100ForConditionalGeneration", "M2M100Config", {**BART, "decoder_layerdrop": 0.0, "encoder_layerdrop": 0.0},
        "SEQ_2_SEQ_LM", "model.decoder.layers.{}.self_attn", reference.opt,
    ),
    "whisper": Case(
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "SEQ_2_SEQ_LM",
        "model.decoder.layers.{}.self_attn", reference.opt, table=("model.decoder.embed_positions", 0),
    ),
    "bert": Case(
        "BertForSequenceClassification", "BertConfig", ENCODER, "SEQ_CLS", "bert.encoder.layer.{}.attention.self",
        reference.bert, table=("bert.embeddings.position_embeddings", 0),
    ),
    "roberta": Case(
        "RobertaForSequenceClassification", "RobertaConfig", {**ENCODER, "pad_token_id": 1}, "SEQ_CLS",
        "roberta.encoder.layer.{}.attention.self", reference.bert,
        table=("roberta.embeddings.position_embeddings", 2),
    ),
    "deberta": Case(
        "DebertaForSequenceClassification", "DebertaConfig", DISENTANGLED, "SEQ_CLS",
        "deberta.encoder.layer.{}.attention.self", reference.deberta,
        table=("deberta.embeddings.position_embeddings", 0), implementations=ONE_FORWARD,
    ),
    # The text and its prefix are longer than the distances that the model tells apart.
    "deberta_near": Case(
        "DebertaForSequenceClassification", "DebertaConfig", {**DISENTANGLED, "max_relative_positions": 6}, "SEQ_CLS",
        "deberta.encoder.layer.{}.attention.self", reference.deberta, implementations=ONE_FORWARD,
    ),
    "deberta_v2": Case(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**DISENTANGLED, "position_biased_input": False, "norm_rel_ebd": "layer_norm"}, "SEQ_CLS",
        "deberta.encoder.layer.{}.attention.self", reference.deberta_v2, implementations=ONE_FORWARD,
    ),
    "deberta_v2_buckets": Case(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**DISENTANGLED, "position_buckets": 6, "max_relative_positions": 30, "share_att_key": True}, "SEQ_CLS",
        "deberta.encoder.layer.{}.attention.self", reference.deberta_v2,
        table=("deberta.embeddings.position_embeddings", 0), implementations=ONE_FORWARD,
    ),
}  # fmt: skip
DECODERS = tuple(name for name, case in CASES.items() if case.task == "CAUSAL_LM")
SEQ2SEQ = ("t5", "umt5", "bart", "m2m100")
ENCODERS = ("bert", "roberta", "deberta", "deberta_v2_buckets")


def batch(name: str, seed: int = 1, rows: int = 2, tokens: int = 11, padding: int = 0, left: bool = False) -> Any:
    """Inputs of one step; the last row has `padding` tokens fewer, padded on the right or the left."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    hidden = slice(0, padding) if left else slice(tokens - padding, tokens)
    mask[-1, hidden] = 0
    ids[-1, hidden] = case.options["pad_token_id"]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if case.task == "SEQ_2_SEQ_LM":
        length = tokens - 2
        answer = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        if "num_mel_bins" in case.options:
            sound = torch.randn(rows, case.options["num_mel_bins"], 40, generator=generator)
            inputs = {"input_features": sound.to(torch.get_default_dtype())}
        return {**inputs, "decoder_input_ids": answer}
    return inputs


def labels(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` with the labels of a training step; padding has none."""
    task = CASES[name].task
    if task == "SEQ_CLS":
        return {**inputs, "labels": torch.arange(len(inputs["input_ids"])) % 3}
    if task == "SEQ_2_SEQ_LM":
        return {**inputs, "labels": inputs["decoder_input_ids"].clone()}
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
