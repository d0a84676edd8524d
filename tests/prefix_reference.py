"""Attention with a prefix, in fp64 and from its definition: the longer sequence [prefix; text], formed outright.

A text of L tokens behind a prefix of n is the last L queries of a sequence of n + L: its tokens stand at positions n
and on, and see n keys and values more. Each family's function below says what that means for its way of knowing
positions, from the module's own weights and what the module was given; none calls the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Text:
    """What an attention was called with.

    Attributes:
        states: (B, L, d), hidden states.
        mask: (B, L), True where a token is no padding.
        positions: (B, L), of the tokens among the text, from 0 on.
        prefix: (n, 2, G, D), keys and values.
        plain: a copy of the model from before it was wrapped.
        args, kwargs: the module's other arguments.
    """

    states: Tensor
    mask: Tensor
    positions: Tensor
    prefix: Tensor
    plain: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def before(self) -> int:
        """Length of the prefix, n."""
        return self.prefix.shape[0]


def heads(x: Tensor, count: int) -> Tensor:
    """(B, L, H D) -> (B, H, L, D)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def longer(text: Text, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[P; text] of keys and values, (B, G, n + L, D) each."""
    rows = key.shape[0]
    pair = text.prefix.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, rows, -1, -1, -1)
    return torch.cat([pair[0], key], dim=2), torch.cat([pair[1], value], dim=2)


def seen(text: Text, causal: bool, window: int | None = None) -> Tensor:
    """(B, 1, L, n + L): which keys of the longer sequence each query sees."""
    rows, length = text.mask.shape
    n = text.before
    keys = torch.cat([torch.ones(rows, n, dtype=torch.bool), text.mask.bool()], dim=1)
    distance = torch.arange(n, n + length)[:, None] - torch.arange(n + length)[None, :]
    allowed = torch.ones(length, n + length, dtype=torch.bool)
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance < window
    return (allowed & keys[:, None, :])[:, None]


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float, bias: Any = 0.0) -> Tensor:
    """softmax(scaling Q K' + bias) V over the allowed keys, in fp64: (B, L, H D)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = scaling * query.double() @ key.transpose(-1, -2) + bias
    weights = torch.softmax(scores.masked_fill(~allowed, -math.inf), dim=-1)
    return (weights.nan_to_num() @ value).transpose(1, 2).flatten(2)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first features of each head, of which there are as many as angles; pairs (i, i + half)."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned, kept], dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J's RoPE: the pairs are (2i, 2i + 1); one angle a pair."""
    turned, kept = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    even, odd = turned[..., ::2], turned[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, kept], dim=-1)


def angles(positions: Tensor, features: int, theta: float = 10000.0) -> Tensor:
    """(B, L, features / 2) fp64: position theta^(-2i / features)."""
    steps = torch.arange(0, features, 2, dtype=torch.float64) / features
    return positions.double()[..., None] * theta**-steps


def turning(text: Text) -> tuple[Tensor, Tensor]:
    """cos and sin at n and on; transformers rounds them to fp32, so they are its, at positions said here."""
    rotary = next(m for m in text.plain.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    return rotary(text.states, text.positions + text.before)


def llama(module: Any, text: Text, window: int | None = None) -> Tensor:
    """RoPE, fewer heads of keys and values than of queries, norms of queries and keys where the module has them."""
    count = module.q_proj.out_features // module.head_dim
    groups = module.k_proj.out_features // module.head_dim
    query, key = heads(module.q_proj(text.states), count), heads(module.k_proj(text.states), groups)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    cos, sin = turning(text)
    query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
    key, value = longer(text, key, heads(module.v_proj(text.states), groups))
    return module.o_proj(attend(query, key, value, seen(text, True, window), module.head_dim**-0.5))


def neox(module: Any, text: Text) -> Tensor:
    """RoPE on a part of each head; queries, keys and values side by side in each head."""
    fused = text.states @ module.query_key_value.weight.T + module.query_key_value.bias
    query, key, value = (x.transpose(1, 2) for x in fused.unflatten(-1, (-1, 3, module.head_size)).unbind(3))
    cos, sin = turning(text)
    assert cos.shape[-1] < module.head_size
    key, value = longer(text, rotate_halves(key, cos, sin), value)
    query = rotate_halves(query, cos, sin)
    return module.dense(attend(query, key, value, seen(text, True), module.head_size**-0.5))


def gptj(module: Any, text: Text) -> Tensor:
    """RoPE by pairs."""
    count, size = module.num_attention_heads, module.head_dim
    query, key, value = (heads(p(text.states), count) for p in (module.q_proj, module.k_proj, module.v_proj))
    turn = angles(text.positions + text.before, module.rotary_dim)
    query, key = (rotate_pairs(x, turn.cos(), turn.sin()) for x in (query, key))
    key, value = longer(text, key, value)
    return module.out_proj(attend(query, key, value, seen(text, True), size**-0.5))


def gpt2(module: Any, text: Text) -> Tensor:
    """Positions are in the states already."""
    query, key, value = (heads(x, module.num_heads) for x in module.c_attn(text.states).chunk(3, dim=-1))
    key, value = longer(text, key, value)
    return module.c_proj(attend(query, key, value, seen(text, True), module.head_dim**-0.5))


def gpt_neo(module: Any, text: Text) -> Tensor:
    """No scaling; a window in every other layer, which counts the prefix as tokens before the text."""
    query, key, value = (heads(p(text.states), module.num_heads) for p in (module.q_proj, module.k_proj, module.v_proj))
    key, value = longer(text, key, value)
    window = text.plain.config.window_size if module.attention_type == "local" else None
    return module.out_proj(attend(query, key, value, seen(text, True, window), 1.0))


def opt(module: Any, text: Text) -> Tensor:
    """OPT's, and a BART decoder's: positions are in the states already."""
    query, key, value = (heads(p(text.states), module.num_heads) for p in (module.q_proj, module.k_proj, module.v_proj))
    key, value = longer(text, key, value)
    return module.out_proj(attend(query, key, value, seen(text, True), module.head_dim**-0.5))


def bert(module: Any, text: Text) -> Tensor:
    """Each token sees all; without an output projection."""
    count = module.num_attention_heads
    query, key, value = (heads(p(text.states), count) for p in (module.query, module.key, module.value))
    key, value = longer(text, key, value)
    return attend(query, key, value, seen(text, False), module.attention_head_size**-0.5)


def bloom(module: Any, text: Text) -> Tensor:
    """ALiBi: a bias of slope times the key's position, the prefix at 0 to n - 1; the residual is added inside."""
    count = module.num_heads
    fused = module.query_key_value(text.states).unflatten(-1, (count, 3, -1))
    query, key, value = (x.transpose(1, 2) for x in fused.unbind(3))
    key, value = longer(text, key, value)
    rows = text.mask.shape[0]
    positions = torch.cat(
        [torch.arange(text.before).expand(rows, -1), (text.positions + text.before) * text.mask], dim=1
    )
    bias = alibi_slopes(count)[None, :, None, None] * positions[:, None, None, :].double()
    context = attend(query, key, value, seen(text, True), module.head_dim**-0.5, bias)
    return module.dense(context) + text.args[0]


def alibi_slopes(count: int) -> Tensor:
    """(H,) fp64: 2^(-8 i / p) for the largest power p of two in H, then the odd ones of 2 p."""
    power = 2 ** (count.bit_length() - 1)
    first = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    rest = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power, 2)]
    return torch.tensor((first + rest)[:count], dtype=torch.float64)


def t5_bucket(distance: int, both_ways: bool, buckets: int, furthest: int) -> int:
    """T5's bucket of a key that lies `distance` before the query (Raffel et al. 2020)."""
    offset = 0
    if both_ways:
        buckets //= 2
        offset = buckets if distance < 0 else 0
        distance = abs(distance)
    distance = max(distance, 0)
    exact = buckets // 2
    if distance >= exact:
        share = math.log(distance / exact) / math.log(furthest / exact)
        distance = min(exact + int(share * (buckets - exact)), buckets - 1)
    return offset + distance


def t5(module: Any, text: Text, table: Tensor | None = None) -> Tensor:
    """A learned bias by distance, of the stack's first layer in all layers; no scaling."""
    if table is None:
        stack = text.plain.decoder if module.is_decoder else text.plain.encoder
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    length, n = text.mask.shape[1], text.before
    options = (not module.is_decoder, module.relative_attention_num_buckets, module.relative_attention_max_distance)
    bucket = torch.tensor([[t5_bucket(i - j, *options) for j in range(n + length)] for i in range(n, n + length)])
    query, key, value = (heads(p(text.states), module.n_heads) for p in (module.q, module.k, module.v))
    key, value = longer(text, key, value)
    bias = table[bucket].permute(2, 0, 1)[None]
    return module.o(attend(query, key, value, seen(text, module.is_decoder), 1.0, bias))


def umt5(module: Any, text: Text) -> Tensor:
    """T5's, with a bias of each layer's own."""
    return t5(module, text, module.relative_attention_bias.weight)


def log_bucket(distance: int, buckets: int, furthest: int) -> int:
    """DeBERTa-v2's bucket of a distance i - j: itself up to half of them, then by logarithm."""
    middle = buckets // 2
    if buckets <= 0 or abs(distance) <= middle:
        return distance
    share = math.log(abs(distance) / middle) / math.log((furthest - 1) / middle)
    return int(math.copysign(math.ceil(share * (middle - 1)) + middle, distance))


def disentangled(
    text: Text, query: Tensor, key: Tensor, value: Tensor, bucket: Callable[[int], int], span: int, terms: Any
) -> Tensor:
    """Scores of contents and of relative positions (He et al. 2021), over the longer sequence.

    Args:
        text: what the attention was called with.
        query: of the text, like `key` and `value`.
        key: see `query`.
        value: see `query`.
        bucket: of a distance i - j.
        span: distances reach from -span to span - 1.
        terms: (H, 2 span, D) of keys of positions or None, and of queries of positions or None.
    """
    key, value = longer(text, key, value)
    length, n = text.mask.shape[1], text.before
    index = torch.tensor([[bucket(i - j) for j in range(n + length)] for i in range(n, n + length)])
    index = (index + span).clamp(0, 2 * span - 1).expand(*query.shape[:2], -1, -1)
    position_keys, position_queries = terms
    factor = 1 + sum(term is not None for term in terms)
    bias: Any = 0.0
    if position_keys is not None:
        bias = bias + (query @ position_keys.transpose(-1, -2)).gather(-1, index)
    if position_queries is not None:
        # K_j . Q^r of the distance from i to j.
        every = (key @ position_queries.transpose(-1, -2))[:, :, None].expand(-1, -1, length, -1, -1)
        bias = bias + every.gather(-1, index[..., None])[..., 0]
    scaling = (query.shape[-1] * factor) ** -0.5
    return attend(query, key, value, seen(text, False), scaling, scaling * bias)


def deberta(module: Any, text: Text) -> Tensor:
    """DeBERTa: exact distances, if any."""
    count = module.num_attention_heads
    query, key, value = heads(module.in_proj(text.states), count).chunk(3, dim=-1)
    query = query + heads(module.q_bias[None, None], count)
    value = value + heads(module.v_bias[None, None], count)
    if not module.relative_attention:
        key, value = longer(text, key, value)
        return attend(query, key, value, seen(text, False), query.shape[-1] ** -0.5)
    furthest = module.max_relative_positions
    span = min(text.before + text.mask.shape[1], furthest)
    vectors = text.kwargs["rel_embeddings"][furthest - span : furthest + span][None]
    kinds = module.pos_att_type
    terms = (
        heads(module.pos_proj(vectors), count) if "c2p" in kinds else None,
        heads(module.pos_q_proj(vectors), count) if "p2c" in kinds else None,
    )
    return disentangled(text, query, key, value, lambda distance: distance, span, terms)


def deberta_v2(module: Any, text: Text) -> Tensor:
    """DeBERTa-v2: distances in buckets, and projections that contents and positions may share."""
    count = module.num_attention_heads
    query, key, value = (heads(p(text.states), count) for p in (module.query_proj, module.key_proj, module.value_proj))
    span = module.pos_ebd_size
    vectors = text.kwargs["rel_embeddings"][: 2 * span][None]
    shared = module.share_att_key
    kinds = module.pos_att_type
    terms = (
        heads((module.key_proj if shared else module.pos_key_proj)(vectors), count) if "c2p" in kinds else None,
        heads((module.query_proj if shared else module.pos_query_proj)(vectors), count) if "p2c" in kinds else None,
    )
    buckets, furthest = module.position_buckets, module.max_relative_positions
    return disentangled(text, query, key, value, lambda d: log_bucket(d, buckets, furthest), span, terms)
