"""Scaled dot-product attention by positions, over torch's kernels, with a naive reference.

Legend: B rows, H query heads, G key-value heads (G divides H), L queries, K keys, D head dimension, F that of values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trilemma.ops.mixing import mixes
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform

# Where a CPU's fused kernel is slow in bfloat16: for few queries (float32 is up to five times faster), and for few keys
# (so are matrix products, six times with the backward pass).
_FEW_QUERIES, _FEW_KEYS = 16, 256


def attention_mask(
    query_positions: Tensor,
    key_positions: Tensor,
    causal: bool,
    window: int | None = None,
    prefix: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> Tensor:
    """Which key each query may look at.

    Args:
        query_positions: [B or 1, L].
        key_positions: [B or 1, K]; -1 marks a key that does not exist.
        causal: keys after the query are hidden, except within a prefix.
        window: a query sees keys less than `window` positions away (its own included).
        prefix: [B] length of the part read in both directions.
        query_segments, key_segments: [B, L], [B, K] packed sequences, which do not see each other.

    Returns:
        [B or 1, 1, L, K] bool.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    allowed = (key >= 0).expand(-1, query.shape[1], -1)
    if causal:
        past = key <= query
        if prefix is not None:
            past = past | (key < prefix[:, None, None])
        allowed = allowed & past
    if window is not None:
        near = (query - key).abs() < window
        if prefix is not None:
            near = near | ((key < prefix[:, None, None]) & (query < prefix[:, None, None]))
        allowed = allowed & near
    if query_segments is not None and key_segments is not None:
        allowed = allowed & (query_segments[:, :, None] == key_segments[:, None, :])
    return allowed[:, None]


@mixes("values")
def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + bias, over allowed keys) V.

    Args:
        queries: [B, H, L, D]. keys: [B, G, K, D]. values: [B, G, K, F]; torch's fused kernels want F = D.
        mask: [B or 1, 1, L, K] True where allowed. A query that may see nothing returns zeros.
        bias: [B or 1, H, L, K] added to the scores.
        is_causal: the plain lower triangle, L = K, with neither mask nor bias.
        scale: None: 1 / sqrt(D).

    Returns:
        [B, H, L, F].
    """
    if queries.dtype == torch.bfloat16 and queries.device.type == "cpu":
        if queries.shape[2] < _FEW_QUERIES:
            wide = (queries.float(), keys.float(), values.float())
            return _attend_fused(*wide, mask, bias, is_causal, scale).to(queries.dtype)
        if keys.shape[2] <= _FEW_KEYS:
            return _attend_by_products(queries, keys, values, mask, bias, is_causal, scale)
    return _attend_fused(queries, keys, values, mask, bias, is_causal, scale)


def _attend_fused(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """`attend` by torch's kernel."""
    shared = keys.shape[1] != queries.shape[1]
    if mask is None and bias is None:
        return scaled_dot_product_attention(queries, keys, values, is_causal=is_causal, scale=scale, enable_gqa=shared)
    blind = None
    scores: Tensor | None = bias.to(queries.dtype) if bias is not None else None
    if mask is not None:
        blind = ~mask.any(dim=-1, keepdim=True)
        open_mask = mask | blind  # keeps the softmax finite; the result is zeroed below
        if scores is None:
            scores = open_mask
        else:
            scores = scores.masked_fill(~open_mask, -math.inf)
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=scores, scale=scale, enable_gqa=shared)
    return out if blind is None else out.masked_fill(blind, 0)


def _attend_by_products(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """`attend` out of matrix products; the probabilities [B, H, L, K] are kept for the backward pass."""
    batch, heads, length, dim = queries.shape
    queries = queries * (1 / math.sqrt(dim) if scale is None else scale)
    scores = (queries.reshape(batch, keys.shape[1], -1, dim) @ keys.mT).view(batch, heads, length, -1)
    if bias is not None:
        scores = scores.float() + bias
    if is_causal:
        mask = torch.ones(length, keys.shape[2], dtype=torch.bool, device=keys.device).tril()[None, None]
    blind = None
    if mask is not None:
        blind = None if is_causal else ~mask.any(dim=-1, keepdim=True)
        scores = scores.masked_fill(~(mask if blind is None else mask | blind), -math.inf)
    shares = scores.softmax(-1).to(values.dtype)
    out = (shares.view(batch, keys.shape[1], -1, keys.shape[2]) @ values).view(batch, heads, length, -1)
    return out if blind is None else out.masked_fill(blind, 0)


def attend_naive(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Reference for `attend`: the same arguments, one query at a time, as the equation is written."""
    batch, heads, length, dim = queries.shape
    groups = heads // keys.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out = torch.zeros(batch, heads, length, values.shape[-1], dtype=queries.dtype, device=queries.device)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = list(range(keys.shape[2]))
                if is_causal:
                    seen = seen[: i + 1]
                if mask is not None:
                    row = mask[b if mask.shape[0] > 1 else 0, 0, i]
                    seen = [j for j in seen if bool(row[j])]
                if not seen:
                    continue
                scores = keys[b, h // groups, seen] @ queries[b, h, i] * scale
                if bias is not None:
                    scores = scores + bias[b if bias.shape[0] > 1 else 0, h, i, seen]
                out[b, h, i] = scores.softmax(dim=0) @ values[b, h // groups, seen]
    return out


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """What the mixers ask for: grouped heads, fewer queries than keys, masks with blind rows, biases, other values."""

    def normal(*shape: int) -> Tensor:
        return drawn_normal(generator, dtype, *shape)

    batch, groups, share = (drawn_integer(generator, 1, 2) for _ in range(3))
    length, more, dim = drawn_integer(generator, 1, 7), drawn_integer(generator, 0, 5), drawn_integer(generator, 1, 5)
    value_dim = dim if drawn_integer(generator, 0, 1) else drawn_integer(generator, 1, 5)
    heads, kind = groups * share, drawn_integer(generator, 0, 3)
    held = length if kind == 0 else length + more
    drawn: dict[str, Any] = {
        "queries": normal(batch, heads, length, dim),
        "keys": normal(batch, groups, held, dim),
        "values": normal(batch, groups, held, value_dim),
        "is_causal": kind == 0,
        "scale": 0.7 if drawn_integer(generator, 0, 1) else None,
    }
    if kind in (1, 3):
        drawn["mask"] = drawn_uniform(generator, dtype, batch, 1, length, held) < 0.6
    if kind in (2, 3):
        drawn["bias"] = normal(batch, heads, length, held)
    return drawn


ATTEND = TruthPair("attend", lambda **given: (attend(**given),), lambda **given: (attend_naive(**given),), _draw)
