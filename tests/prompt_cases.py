"""Models, configurations and peft's twins for the tests of methods whose prompt is put before the text."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

import pyadapt
from pyadapt.config import as_config

VOCABULARY, WIDTH, TOKENS = 50, 16, 3
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_labels": 3,
}  # fmt: skip
_ENCODER = {**_DECODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}
_GPT2 = {**_GPT, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}
_STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BART = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "dropout": 0.0, "forced_eos_token_id": None, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
}  # fmt: skip
_DEBERTA = {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

# Family -> (stem of the transformers classes, options of the configuration).
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_DECODER, "num_key_value_heads": 2}),
    "mistral": ("Mistral", {**_DECODER, "num_key_value_heads": 2, "sliding_window": 6}),
    "gemma": ("Gemma", {**_DECODER, "num_key_value_heads": 1, "head_dim": 8}),
    "gpt2": ("GPT2", {**_GPT2, **_STILL}),
    "bloom": ("Bloom", {**_GPT, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}),
    "opt": (
        "OPT",
        {**_DECODER, "ffn_dim": 32, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
    ),
    "t5": (
        "T5",
        {"d_model": WIDTH, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
         "decoder_start_token_id": 0, "dropout_rate": 0.0, "pad_token_id": 0},
    ),
    "bart": ("Bart", _BART),
    "bert": ("Bert", _ENCODER),
    "roberta": ("Roberta", {**_ENCODER, "max_position_embeddings": 70}),
    "deberta": ("Deberta", _DEBERTA),
    "deberta-v2": ("DebertaV2", {**_DEBERTA, "position_buckets": 4}),
}  # fmt: skip
_ENDS = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "Model",
}
DECODERS = ("llama", "mistral", "gemma", "gpt2", "bloom", "opt")
SEQ2SEQ = ("t5", "bart")
NEW = 8
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

# Configurations of every kind, by a short name.
CONFIGS: dict[str, dict[str, Any]] = {
    "prompt": {"peft_type": "PROMPT_TUNING"},
    "mlp": {"peft_type": "P_TUNING", "encoder_hidden_size": 8},
    "lstm": {"peft_type": "P_TUNING", "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
    "multitask": {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 3, "num_ranks": 2},
}
TASKS = torch.tensor([2, 0])


def build(family: str, task: str, seed: int = 0, **options: Any) -> Any:
    """The tiny model of a family with the head of a task, in evaluation mode, with weights that tell tokens apart."""
    import transformers

    stem, config = _FAMILIES[family]
    end = "LMHeadModel" if (family, task) == ("gpt2", "CAUSAL_LM") else _ENDS[task]
    if task == "QUESTION_ANS":
        config = {**config, "num_labels": 2}
    torch.manual_seed(seed)
    made = getattr(transformers, f"{stem}{end}")(getattr(transformers, f"{stem}Config")(**{**config, **options}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def batch(task: str, rows: int = 2, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Ids, a mask and labels for one step of a task."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids = draw(VOCABULARY, rows, length, low=3)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = {
        "CAUSAL_LM": lambda: {"labels": ids},
        "SEQ_2_SEQ_LM": lambda: {"labels": draw(VOCABULARY, rows, 5, low=3)},
        "SEQ_CLS": lambda: {"labels": draw(3, rows)},
        "TOKEN_CLS": lambda: {"labels": draw(3, rows, length)},
        "QUESTION_ANS": lambda: {"start_positions": draw(length, rows), "end_positions": draw(length, rows)},
    }
    return {**found, **labels.get(task, dict)()}


def config_of(kind: str, task: str | None, **options: Any) -> Any:
    """A configuration of `CONFIGS` for a task; with one prompt, as peft's `generate` forgets the second."""
    return as_config(
        {"task_type": task, "num_virtual_tokens": TOKENS, "num_transformer_submodules": 1, **CONFIGS[kind], **options}
    )


def extra(kind: str, rows: int = 2) -> dict[str, Tensor]:
    """What a call needs besides the batch."""
    return {"task_ids": TASKS[:rows]} if kind == "multitask" else {}


def wrapped(family: str, task: str, kind: str = "prompt", **options: Any) -> Any:
    """A tiny model with a fresh adapter, in evaluation mode."""
    model = build(family, task)
    torch.manual_seed(7)
    return louder(pyadapt.wrap(model, config_of(kind, task, **options)).eval())


def louder(model: Any) -> Any:
    """The model with a prompt that nobody can overlook: what a multitask one starts with is close to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".columns", ".rows")):
                parameter.mul_(40.0)
            elif name.endswith(".embeddings"):
                parameter.mul_(2.0)
    return model


def peft_name(name: str) -> str:
    """peft's name of a parameter of a prompt, from ours."""
    attribute = name.partition(".default.")[2]
    product = re.fullmatch(r"mlp_(\d+)_(\w+)", attribute)
    if product:
        return f"prompt_encoder.default.mlp_head.{2 * int(product[1])}.{product[2]}"
    renamed = {"embeddings": "embedding.weight", "columns": "prefix_task_cols", "rows": "prefix_task_rows"}
    return "prompt_encoder.default." + renamed.get(attribute, attribute.replace("lstm_", "lstm_head.", 1))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def pairs(model: Any, twin: Any) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, ours, peft's) of each trained parameter; each is met on both sides."""
    theirs, found = dict(trained(twin)), []
    for name, parameter in trained(model).items():
        if ".copies." in name:
            key = f"base_model.{name.replace('.copies.', '.modules_to_save.')}"
        else:
            key = peft_name(name)
        found.append((name, parameter, theirs.pop(key)))
    assert not theirs, sorted(theirs)
    return found


def peft_twin(base: nn.Module, model: Any) -> Any:
    """peft's model over a copy of the plain `base`, with the values of `model`'s adapter."""
    import peft

    config = model.peft_config["default"]
    fields = {"task_type", "num_virtual_tokens", "num_transformer_submodules", "encoder_hidden_size", "num_tasks"}
    fields |= {"encoder_reparameterization_type", "num_ranks", "modules_to_save"}
    given = {name: value for name in fields if (value := getattr(config, name, None)) is not None}
    given["task_type"] = given["task_type"].value
    if "encoder_reparameterization_type" in given:
        given["encoder_reparameterization_type"] = given["encoder_reparameterization_type"].value
    else:
        given.pop("encoder_hidden_size", None)
    theirs = peft.get_peft_config({"peft_type": config.peft_type, **given})
    twin: Any = peft.get_peft_model(copy.deepcopy(base), theirs)
    with torch.no_grad():
        for _, own, other in pairs(model, twin):
            other.copy_(own)
    return twin.train(model.training)


def task_of(family: str) -> str:
    """The task in which a family generates."""
    return "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM"


def ids_of(family: str, rows: int = 2) -> Tensor:
    """A text for `generate`."""
    return batch(task_of(family), rows)["input_ids"]


def generated(model: Any, *args: Any, **options: Any) -> Any:
    """What `generate` gives, greedily and from one seed unless told otherwise."""
    torch.manual_seed(3)
    return model.generate(*args, **{**GREEDY, **options})


def named(options: dict[str, Any]) -> str:
    """Options of `generate` as the name of a case."""
    return " ".join(f"{key}={value}" for key, value in options.items()) or "greedy"
