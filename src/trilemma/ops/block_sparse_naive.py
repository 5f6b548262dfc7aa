"""The reference of block-sparse attention: one query at a time, as the equations of `ops/block_sparse.py` are written.

Legend: B rows, H query heads, G key-value heads, L queries, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trilemma.ops.block_sparse import BlockSizes, Places, block_sparse_attention, packed_blocks
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform


def block_sparse_naive(
    queries: Tensor,
    compressed: tuple[Tensor, Tensor],
    selected: tuple[Tensor, Tensor],
    window: tuple[Tensor, Tensor],
    gates: Tensor,
    places: Places,
    sizes: BlockSizes,
) -> Tensor:
    """Reference for `block_sparse_attention`: one query at a time, as the equations are written."""
    (batch, heads, length), groups = queries.shape[:3], compressed[0].shape[1]
    share = heads // groups
    out = torch.zeros_like(queries)
    for b in range(batch):
        for t in range(length):
            at = _of_row(places.queries, b, t)
            begin, skipped = _of_row(places.begins, b, t), _of_row(places.skipped, b, t)
            ended = [skipped + i for i in range(sizes.ended(at - begin + 1))]
            near = [
                m
                for m in range(window[0].shape[2])
                if max(begin, at - sizes.window + 1) <= _of_row(places.window, b, m) <= at
            ]
            for g in range(groups):
                mine = range(g * share, (g + 1) * share)
                scores = [0.0] * len(ended)
                parts: dict[int, list[Tensor]] = {h: [] for h in mine}
                for h in mine:
                    read, weights = _read(queries[b, h, t], compressed, b, g, ended)
                    parts[h].append(read)
                    scores = [score + weight for score, weight in zip(scores, weights.tolist(), strict=True)]
                fine = [begin + i for i in _naive_choice(scores, at - begin, sizes)]
                for h in mine:
                    for branch, seen in ((selected, fine), (window, near)):
                        parts[h].append(_read(queries[b, h, t], branch, b, g, seen)[0])
                    out[b, h, t] = gates[b, h, t] @ torch.stack(parts[h])
    return out


def _naive_choice(scores: list[float], position: int, sizes: BlockSizes) -> list[int]:
    """Tokens, up to `position`, of the blocks that a query selects by the scores of its compressed blocks."""
    own = position // sizes.select
    importance = []
    for j in range(own + 1):
        tokens = set(range(j * sizes.select, (j + 1) * sizes.select))
        covered = [tokens & set(range(i * sizes.stride, i * sizes.stride + sizes.compress)) for i in range(len(scores))]
        importance.append(sum(score * len(part) / sizes.stride for score, part in zip(scores, covered, strict=True)))
    fixed = {j for j in range(own + 1) if j < sizes.initial or j > own - sizes.local}
    free = sorted(set(range(own + 1)) - fixed, key=lambda j: (-importance[j], j))
    chosen = fixed | set(free[: sizes.count - len(fixed)])
    return [token for token in range(position + 1) if token // sizes.select in chosen]


def _read(query: Tensor, branch: tuple[Tensor, Tensor], row: int, group: int, seen: list[int]) -> tuple[Tensor, Tensor]:
    """What one query reads from the keys `seen`, and with which weights; zeros if there are none."""
    keys, values = (tensor[row, group, seen] for tensor in branch)
    weights = (keys @ query / math.sqrt(len(query))).softmax(dim=0)
    return weights @ values, weights


def _of_row(table: Tensor | None, row: int, column: int) -> int:
    return 0 if table is None else int(table[row if len(table) > 1 else 0, column])


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Whole sequences, packed rows, and rows that go on after unequal pasts, in chunks of any size."""

    def number(low: int, high: int) -> int:
        return drawn_integer(generator, low, high)

    stride, initial, local = number(1, 3), number(0, 2), number(1, 2)
    count = initial + local + number(0, 2)
    sizes = BlockSizes(stride * number(1, 3), stride, stride * number(1, 2), count, initial, local, number(1, 6))
    batch, groups, share, dim, length = number(1, 2), number(1, 2), number(1, 2), number(1, 4), number(1, 14)
    steps, kind = torch.arange(length), number(0, 2)
    places = Places(steps[None], steps[None], 0, length)
    if kind == 1:
        cuts = drawn_uniform(generator, dtype, batch, length) < 0.2
        begins = torch.where(cuts, steps, 0).cummax(dim=1).values
        places = Places(steps[None], steps[None], 0, length, begins, packed_blocks(steps - begins, sizes)[1])
    if kind == 2:
        past = torch.tensor([number(0, 12) for _ in range(batch)])[:, None]
        ring = past - 1 - torch.arange(sizes.window)
        line = torch.cat([torch.where(ring >= 0, ring, -1), past + steps], dim=1)
        places = Places(past + steps, line, int(past.max()), int(past.max()) + length)

    def pair(size: int) -> tuple[Tensor, Tensor]:
        keys, values = drawn_normal(generator, dtype, 2, batch, groups, size, dim).unbind(0)
        return keys, values

    room = number(0, 3)
    counts = (sizes.ended(places.held) + room, places.held + room, places.window.shape[1])
    keys, values = zip(*(pair(count) for count in counts), strict=True)
    named = {f"{branch}_keys": tensor for branch, tensor in zip(_BRANCHES, keys, strict=True)}
    named |= {f"{branch}_values": tensor for branch, tensor in zip(_BRANCHES, values, strict=True)}
    queries = drawn_normal(generator, dtype, batch, groups * share, length, dim)
    gates = drawn_uniform(generator, dtype, batch, groups * share, length, 3)
    return {"queries": queries, **named, "gates": gates, "places": places, "sizes": sizes, "chunk_size": number(1, 6)}


_BRANCHES = ("compressed", "selected", "window")


def _branches(given: dict[str, Any]) -> dict[str, Any]:
    """The drawn arguments as the functions take them."""
    for branch in _BRANCHES:
        given[branch] = (given.pop(f"{branch}_keys"), given.pop(f"{branch}_values"))
    return given


def _naive(chunk_size: int, **given: Any) -> tuple[Tensor, ...]:
    return (block_sparse_naive(**_branches(given)),)


BLOCK_SPARSE = TruthPair(
    "block_sparse_attention", lambda **given: (block_sparse_attention(**_branches(given)),), _naive, _draw
)
