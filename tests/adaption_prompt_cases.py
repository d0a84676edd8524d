"""LLaMA-Adapter by its definition, for the decoders of the product: what it adds to an attention's output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from models.zoo import MODELS
from torch import Tensor

import pyadapt
from pyadapt import AdaptionPromptConfig

ROWS = {row.model_class: row for row in MODELS}

_LLAMA_LIKE = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi", "Mixtral", "Olmo"]
# Class of a model -> where the attention of its i-th layer is.
DECODERS = {
    "GPT2LMHeadModel": "transformer.h.{}.attn",
    "BloomForCausalLM": "transformer.h.{}.self_attention",
    "OPTForCausalLM": "model.decoder.layers.{}.self_attn",
    "GPTNeoForCausalLM": "transformer.h.{}.attn.attention",
    "GPTJForCausalLM": "transformer.h.{}.attn",
    "GPTNeoXForCausalLM": "gpt_neox.layers.{}.attention",
    **{f"{name}ForCausalLM": "model.layers.{}.self_attn" for name in _LLAMA_LIKE},
    "T5ForConditionalGeneration": "decoder.block.{}.layer.0.SelfAttention",
    "BartForConditionalGeneration": "model.decoder.layers.{}.self_attn",
    "WhisperForConditionalGeneration": "model.decoder.layers.{}.self_attn",
}
LENGTH = 3


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model of a class."""
    model = ROWS[name].build().to(dtype)
    if name == "MixtralForCausalLM":
        # torch's grouped_mm has no fp64.
        model.set_experts_implementation("eager")
    return model


def batch_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs and labels, floating ones in `dtype`."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in ROWS[name].batch().items()}


def wrapped(model: Any, layers: int = 2, gate: float | None = 0.7, **options: Any) -> Any:
    """`model` with an adapter whose gates are `gate`, and half as much more in each further layer."""
    model = pyadapt.wrap(model, AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=layers, **options))
    if gate is not None:
        open_gates(model, gate)
    return model


def open_gates(model: Any, gate: float, name: str = "default") -> None:
    """Let the gates be `gate`, half as much more in each further layer."""
    with torch.no_grad():
        for i, (_, parameter) in enumerate(gates(model, name)):
            parameter.fill_(gate * (1 + 0.5 * i))


def gates(model: Any, name: str = "default") -> list[tuple[str, Tensor]]:
    """(key, gate) of each layer with one."""
    return [(key, value) for key, value in model.named_parameters() if key.endswith(f"adapters.{name}.gate")]


def greedy(model: Any, name: str, **options: Any) -> Tensor:
    """What `model` generates from its batch."""
    return model.generate(**ROWS[name].prompt(batch_of(name)), max_new_tokens=6, **{"do_sample": False, **options})


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What `model` makes of `batch`."""
    with torch.no_grad():
        return model(**batch).logits


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients, by name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


# The definition.


def add_by_definition(plain: Any, adapters: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Let each attention of `plain` at a path in `adapters` add the attention over its prompt, with its gate.

    Args:
        plain: a model without an adapter of this method.
        adapters: path -> prompt (1, n, d) and gate (1,).
    """
    for path, (prompt, gate) in adapters.items():

        def hook(layer, args, kwargs, output, prompt=prompt, gate=gate):
            states = args[0] if args else kwargs["hidden_states"]
            added = term(layer, states, prompt, gate, kwargs)
            return (output[0] + added, *output[1:])

        plain.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


def term(layer: Any, states: Tensor, prompt: Tensor, gate: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """What a prompt adds to the output of an attention, (B, L, d).

    gate softmax(rotated(q) k_p' / sqrt(D)) v_p through the output projection, without the bias that the attention's own
    output has passed already; in GPT-2, as in peft, behind it.
    """
    query, _, _ = _projected(layer, states)
    _, key, value = _projected(layer, prompt)
    query = _at_positions(layer, query, kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scaled = 1.0 if type(layer).__name__ in ("T5Attention", "GPTNeoSelfAttention") else query.shape[-1] ** -0.5
    weights = gate * torch.softmax(query @ key.transpose(-1, -2) * scaled, dim=-1)
    added = (weights @ value).transpose(1, 2).flatten(2)
    if type(layer).__name__ == "GPT2Attention":
        return added
    name = next(name for name in ("o_proj", "out_proj", "dense", "o") if hasattr(layer, name))
    return F.linear(added, getattr(layer, name).weight)


def _projected(layer: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of states, (B, heads, L, D), without positions."""
    names = ("head_dim", "head_size", "key_value_proj_dim")
    size = next(getattr(layer, name) for name in names if hasattr(layer, name))
    if hasattr(layer, "c_attn"):
        three = [part.unflatten(-1, (-1, size)) for part in layer.c_attn(states).chunk(3, dim=-1)]
    elif hasattr(layer, "query_key_value"):
        three = list(layer.query_key_value(states).unflatten(-1, (-1, 3, size)).unbind(-2))
    else:
        projections = [getattr(layer, letter + ("_proj" if hasattr(layer, "q_proj") else "")) for letter in "qkv"]
        three = [projection(states).unflatten(-1, (-1, size)) for projection in projections]
    if type(layer).__name__ == "Qwen3Attention":
        three[:2] = layer.q_norm(three[0]), layer.k_norm(three[1])
    query, key, value = (part.transpose(1, 2) for part in three)
    return query, key, value


def _at_positions(layer: Any, query: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The queries, rotated where the attention rotates them; the first features of a head alone where it does so."""
    if type(layer).__name__ == "GPTJAttention":
        size = layer.rotary_dim
        # Its table is fp32 in every dtype.
        steps = 1.0 / (10000 ** (torch.arange(0, size, 2) / size))
        angles = (kwargs["position_ids"][..., None] * steps)[:, None]
        cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        even, odd = query[..., :size:2], query[..., 1:size:2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        return torch.cat([turned.flatten(-2), query[..., size:]], dim=-1)
    if "position_embeddings" not in kwargs:
        return query
    cos, sin = (x[:, None] for x in kwargs["position_embeddings"])
    size = cos.shape[-1]
    turned, rest = query[..., :size], query[..., size:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)
