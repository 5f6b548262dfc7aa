"""Block-sparse attention (NSA, "Native Sparse Attention", Yuan et al. 2025, arXiv 2502.11089, section 3).

    compressed   p_t = softmax(q_t K_cmp / sqrt(D)) over the blocks that ended at or before t, o_t = p_t V_cmp  (eq. 8)
    importance   I_t[j] = sum of p_t[i] over the heads of a group and the compressed blocks i that overlap the selection
                 block j, each as often as it has strides in it                                            (eq. 9, 10)
    selected     attention to the tokens up to t of the `count` blocks of the largest importance, the first ones and the
                 local ones always among them                                                             (eq. 11, 12)
    window       attention to the last `window` tokens
    output       the sum of the three, each weighed by its gate                                                 (eq. 5)

Queries are worked on in chunks, so that no more than one chunk's scores and gathered keys exist at a time; the backward
pass makes them anew. The softmax that ranks the blocks is float32 at least, and equal importance goes to the earlier
block: which blocks are read does not depend on how a sequence is cut, but for ties closer than rounding.

Legend: B rows, H query heads, G key-value heads (G divides H), L queries, D head dimension, N compressed blocks, K keys
of the selected branch, M keys of the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from trilemma.ops.attention import attend
from trilemma.ops.mixing import mixes

Count = TypeVar("Count", int, Tensor)

# Up to so many times the selected tokens a mask over all is faster than gathering each query's own.
_MASKED = 4


def ended_blocks(tokens: Count, size: int, stride: int) -> Count:
    """How many of the blocks of `size` tokens that begin every `stride` tokens lie whole within the first `tokens`."""
    reached = tokens - (size - stride)
    if isinstance(reached, Tensor):
        return reached.clamp(min=0) // stride
    return max(reached, 0) // stride


@dataclass(frozen=True)
class BlockSizes:
    """Sizes in tokens, but for `count`, `initial` and `local`, which are in selection blocks.

    Attributes:
        compress: l, of a compressed block.
        stride: d, from one compressed block to the next; divides `compress` and `select`.
        select: l', of a selection block.
        count: n, blocks that a query reads, the fixed ones included.
        initial, local: blocks that are always read: a sequence's first ones; the query's own and those before it.
        window: w, the query's own token included.
    """

    compress: int
    stride: int
    select: int
    count: int
    initial: int
    local: int
    window: int

    def ended(self, tokens: Count) -> Count:
        """Compressed blocks that lie whole within the first `tokens` tokens."""
        return ended_blocks(tokens, self.compress, self.stride)

    def selected_pairs(self, position: int) -> int:
        """Tokens that the query at `position` reads through its selected blocks."""
        return (min(position // self.select + 1, self.count) - 1) * self.select + position % self.select + 1


@dataclass(frozen=True)
class Places:
    """Where queries and keys stand on the line of their row's tokens; packed sequences lie on one line.

    Attributes:
        queries: [B or 1, L] index of each query. Key k of the selected branch stands at k.
        window: [B or 1, M] index of each window key, -1 where there is none. The call's own keys come last, in order.
        earlier, held: tokens on the line before the call, and in all; the most of any row.
        begins: [B, L] where the query's sequence begins; None: at 0.
        skipped: [B, L] compressed blocks of the sequences before it; None: 0.
    """

    queries: Tensor
    window: Tensor
    earlier: int
    held: int
    begins: Tensor | None = None
    skipped: Tensor | None = None

    @property
    def within(self) -> Tensor:
        """[B or 1, L] position of each query in its own sequence."""
        return self.queries if self.begins is None else self.queries - self.begins

    def chunk(self, queries: slice, window: slice) -> Places:
        """The places of some queries and window keys; nothing behind the last of them is held."""
        return Places(
            queries=self.queries[:, queries],
            window=self.window[:, window],
            earlier=self.earlier,
            held=min(self.held, self.earlier + queries.stop),
            begins=None if self.begins is None else self.begins[:, queries],
            skipped=None if self.skipped is None else self.skipped[:, queries],
        )


def rows_at(table: Tensor, index: Tensor) -> Tensor:
    """Rows of each table, copied whole: much faster than `gather`.

    Args:
        table: [..., K, D].
        index: [..., I], whose leading axes may be 1.

    Returns:
        [..., I, D].
    """
    *lead, count, width = table.shape
    first = torch.arange(0, math.prod(lead) * count, count, device=index.device).view(*lead, 1)
    found = table.reshape(-1, width).index_select(0, (index + first).flatten())
    return found.view(*lead, index.shape[-1], width)


def packed_blocks(within: Tensor, sizes: BlockSizes) -> tuple[Tensor, Tensor]:
    """Compressed blocks of packed rows, counted from each sequence's own beginning, in the order of the line.

    Args:
        within: [B, L] position of each token in its sequence.

    Returns:
        starts [B, N] index of each block's first token, N = sizes.ended(L); a row that has fewer blocks ends in places
        that no query sees. skipped [B, L] blocks of the sequences before each token's own.
    """
    length = within.shape[1]
    past = within + 1 - sizes.compress
    ends = (past >= 0) & (past % sizes.stride == 0)
    total = ends.long().cumsum(dim=1)
    wanted = torch.arange(1, sizes.ended(length) + 1, device=within.device).expand(len(within), -1)
    last = torch.searchsorted(total, wanted.contiguous()).clamp(max=length - 1)
    return (last - sizes.compress + 1).clamp(min=0), total - sizes.ended(within + 1)


def block_sparse_attention(
    queries: Tensor,
    compressed: tuple[Tensor, Tensor],
    selected: tuple[Tensor, Tensor],
    window: tuple[Tensor, Tensor],
    gates: Tensor,
    places: Places,
    sizes: BlockSizes,
    chunk_size: int = 64,
) -> Tensor:
    """The gated sum of the three branches.

    Args:
        queries: [B, H, L, D].
        compressed, selected, window: keys and values, [B, G, N, D], [B, G, K, D], [B, G, M, D]. N and K may be larger
            than what `places.held` tokens need.
        gates: [B, H, L, 3] weights of the compressed, the selected and the window branch.
        places: where they stand.
        sizes: of the blocks.
        chunk_size: queries worked on at a time; changes memory and speed, never the answer.

    Returns:
        [B, H, L, D] of the queries' type.
    """
    length = queries.shape[2]
    if length <= chunk_size:
        return _attend_chunk(queries, compressed, selected, window, gates, places, sizes)
    old, outs = window[0].shape[2] - length, []
    for begin in range(0, length, chunk_size):
        part = slice(begin, min(begin + chunk_size, length))
        oldest = begin - sizes.window + 1  # key that the chunk's window reaches, among the call's own
        near = slice(old + oldest if oldest >= 0 else 0, old + part.stop)
        arguments = (
            queries[:, :, part],
            compressed,
            selected,
            (window[0][:, :, near], window[1][:, :, near]),
            gates[:, :, part],
            places.chunk(part, near),
            sizes,
        )
        if torch.is_grad_enabled():
            outs.append(checkpoint(_attend_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(_attend_chunk(*arguments))
    return torch.cat(outs, dim=2)


def _attend_chunk(
    queries: Tensor,
    compressed: tuple[Tensor, Tensor],
    selected: tuple[Tensor, Tensor],
    window: tuple[Tensor, Tensor],
    gates: Tensor,
    places: Places,
    sizes: BlockSizes,
) -> Tensor:
    coarse, mass = attend_compressed(queries, *compressed, places, sizes)
    blocks, chosen = -(-places.held // sizes.select), None
    if blocks > sizes.count:
        chosen = select_blocks(block_importance(mass, blocks, places.skipped, sizes), places.within, sizes)
    if chosen is None or places.held <= _MASKED * sizes.count * sizes.select:
        fine = attend_masked(queries, *selected, chosen, places, sizes)
    else:
        fine = attend_gathered(queries, *selected, chosen, places, sizes)
    far = places.queries - places.within.clamp(max=sizes.window - 1)
    near_by = (places.window[:, None] <= places.queries[..., None]) & (places.window[:, None] >= far[..., None])
    keys, values = (tensor.to(queries.dtype) for tensor in window)
    near = attend(queries, keys, values, near_by[:, None])
    first, second, third = gates.to(queries.dtype).unbind(dim=-1)
    return first[..., None] * coarse + second[..., None] * fine + third[..., None] * near


@mixes("values")
def attend_compressed(
    queries: Tensor, keys: Tensor, values: Tensor, places: Places, sizes: BlockSizes
) -> tuple[Tensor, Tensor]:
    """Attention to the compressed blocks that have ended; zeros where there is none yet.

    Args:
        queries: [B, H, L, D]. keys, values: [B, G, N or more, D].

    Returns:
        out [B, H, L, D]; mass [B, G, L, N], the probabilities summed over a group's heads, without gradient, float32 at
        least.
    """
    (batch, heads, length, dim), groups, blocks = queries.shape, keys.shape[1], sizes.ended(places.held)
    number = torch.arange(blocks, device=queries.device)
    if places.skipped is not None:
        number = number - places.skipped[..., None]
    hidden = number * sizes.stride + (sizes.compress - 1) > places.within[..., None]
    if places.skipped is not None:
        hidden = hidden | (number < 0)
    hidden = hidden[:, None, None]
    precise = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        grouped = queries.to(precise).reshape(batch, groups, -1, dim) * dim**-0.5
        scores = grouped @ keys[:, :, :blocks].to(precise).transpose(2, 3)
        scores = scores.view(batch, groups, heads // groups, length, blocks)
        # The lowest number instead of -inf: a query that sees nothing must not divide zero by zero.
        weights = scores.masked_fill(hidden, torch.finfo(precise).min).softmax(dim=-1).masked_fill(hidden, 0)
        out = weights.flatten(2, 3) @ values[:, :, :blocks].to(precise)
    return out.view(batch, heads, length, dim).to(queries.dtype), weights.detach().sum(dim=2)


def block_importance(mass: Tensor, blocks: int, skipped: Tensor | None, sizes: BlockSizes) -> Tensor:
    """Equation 9, where the paper counts blocks from 1: what compressed blocks share with each selection block.

    Args:
        mass: [B, G, L, N] from `attend_compressed`.
        blocks: selection blocks.
        skipped: as in `Places`.

    Returns:
        [B, G, L, blocks].
    """
    count = mass.shape[3]
    if skipped is not None:
        slots = skipped[:, None, :, None] + torch.arange(count, device=mass.device)
        mass = mass.gather(3, slots.clamp(max=count - 1).expand_as(mass)).masked_fill(slots >= count, 0)
    strides, overlap = sizes.select // sizes.stride, sizes.compress // sizes.stride
    # A stride is covered by the blocks that begin at it and at the overlap - 1 strides before it.
    padded = torch.nn.functional.pad(mass, (overlap - 1, blocks * strides - count))
    covered = padded.unfold(3, overlap, 1).sum(dim=-1)
    return covered.view(*covered.shape[:3], blocks, strides).sum(dim=-1)


def select_blocks(importance: Tensor, within: Tensor, sizes: BlockSizes) -> Tensor:
    """The fixed blocks and those of the largest importance, the earlier one of two that are equal.

    Args:
        importance: [B, G, L, blocks].
        within: [B or 1, L] position of each query in its sequence.

    Returns:
        [B, G, L, count] numbers of blocks within the sequence; later than the query's own block where it has fewer.
    """
    numbers = torch.arange(importance.shape[3], device=importance.device)
    ahead = numbers - (within // sizes.select)[:, None, :, None]
    fixed = (numbers < sizes.initial) | (ahead > -sizes.local)
    ranked = importance.masked_fill(fixed, math.inf).masked_fill(ahead > 0, -math.inf)
    return ranked.sort(dim=-1, descending=True, stable=True).indices[..., : sizes.count]


@mixes("values")
def attend_gathered(
    queries: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, places: Places, sizes: BlockSizes
) -> Tensor:
    """Attention to the tokens of the chosen blocks up to the query's own.

    Args:
        queries: [B, H, L, D]. keys, values: [B, G, K, D].
        chosen: [B, G, L, n] from `select_blocks`.

    Returns:
        [B, H, L, D].
    """
    (batch, heads, length, dim), groups = queries.shape, keys.shape[1]
    line = (chosen[..., None] * sizes.select + torch.arange(sizes.select, device=chosen.device)).flatten(3)
    if places.begins is not None:
        line = line + places.begins[:, None, :, None]
    allowed = line <= places.queries[:, None, :, None]  # each query sees itself
    index = line.clamp(max=places.held - 1).flatten(2)
    # Each query is a row of its own, in which the group's heads are the queries.
    asked = queries.view(batch, groups, -1, length, dim).transpose(2, 3).flatten(0, 2)[:, None]
    shape = (len(asked), 1, -1, dim)
    keys, values = (rows_at(tensor, index).to(queries.dtype).view(shape) for tensor in (keys, values))
    out = scaled_dot_product_attention(asked, keys, values, attn_mask=allowed.flatten(0, 2)[:, None, None])
    return out.view(batch, groups, length, -1, dim).transpose(2, 3).reshape(batch, heads, length, dim)


@mixes("values")
def attend_masked(
    queries: Tensor, keys: Tensor, values: Tensor, chosen: Tensor | None, places: Places, sizes: BlockSizes
) -> Tensor:
    """What `attend_gathered` gives, by a mask over all tokens. `chosen`: None: every block."""
    (batch, heads, length, _), groups = queries.shape, keys.shape[1]
    line = torch.arange(places.held, device=queries.device)
    seen = (line <= places.queries[..., None])[:, None]
    if places.begins is not None:
        line = line - places.begins[:, None, :, None]
        seen = seen & (line >= 0)
    if chosen is not None:
        blocks = -(-places.held // sizes.select)
        number = (line.clamp(min=0) // sizes.select).expand(batch, groups, length, places.held)
        open_blocks = torch.zeros(batch, groups, length, blocks, dtype=torch.bool, device=line.device)
        seen = seen & open_blocks.scatter(3, chosen, True).gather(3, number)
        seen = seen.repeat_interleave(heads // groups, dim=1)
    keys, values = (tensor[:, :, : places.held].to(queries.dtype) for tensor in (keys, values))
    return scaled_dot_product_attention(queries, keys, values, attn_mask=seen, enable_gqa=groups != heads)
