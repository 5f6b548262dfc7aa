"""Native sparse attention (NSA, Yuan et al. 2025, arXiv 2502.11089).

    y_t = concat_h( sum_c g_t,c,h Attention(q_t,h, K_c, V_c) ) W_O,  g_t = sigmoid(x_t W_g)                    (eq. 5)

over three branches c with keys and values of their own: compressed (blocks of l tokens, one every d, each pooled by an
MLP into one key and one value), selected (the tokens of the n blocks of l' tokens that the compressed branch finds most
important) and a sliding window. The equations of the branches are in `trilemma.ops.block_sparse`.

Legend: B rows, L length, H query heads, G key-value heads, D head dimension, N compressed blocks, l tokens of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.cache import KVCache, RingCache
from trilemma.nn.coded_cache import CodedCache, CodedRing, as_kept, make_cache, make_ring, token_bytes
from trilemma.nn.convolution import extended, next_tail
from trilemma.nn.positions import rotate, rotation_frequencies
from trilemma.ops.block_sparse import (
    BlockSizes,
    Places,
    block_sparse_attention,
    ended_blocks,
    packed_blocks,
    rows_at,
)
from trilemma.ops.block_sparse_naive import BLOCK_SPARSE
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, call_positions
from trilemma.registry import register_mixer
from trilemma.state import State, updated


class BlockCompressor(nn.Module):
    """phi of equation 7: position embeddings within the block, then an MLP from all its tokens to one.

    Args:
        heads: G; they share the MLP.
        size: l.
        head_dim: D.
        hidden: width of the MLP.
    """

    def __init__(self, heads: int, size: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(size, heads, head_dim))
        # Without biases: the embeddings stand for the first one, and a second one would shift all scores alike.
        self.up, self.down = nn.Linear(size * head_dim, hidden, bias=False), nn.Linear(hidden, head_dim, bias=False)
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, blocks: Tensor) -> Tensor:
        """blocks: [B, N, l, G, D] -> [B, G, N, D]."""
        placed = blocks + self.position.to(blocks.dtype)
        pooled: Tensor = self.down(nn.functional.gelu(self.up(placed.permute(0, 3, 1, 2, 4).flatten(3))))
        return pooled


@dataclass
class BlockSparseState(State):
    """What the three branches have read.

    Attributes:
        selected: keys and values of all tokens.
        window: those of the last w tokens.
        tail: [B, l - 1, 2 G D] the last tokens' keys and values before compression: all that blocks under construction
            need.
        keys, values: [B, G, capacity, D] of the compressed blocks; zero where none has ended yet.
        size, stride: l and d.
    """

    growing: ClassVar[dict[str, int]] = {"keys": 2, "values": 2}

    selected: KVCache | CodedCache
    window: RingCache | CodedRing
    tail: Tensor
    keys: Tensor
    values: Tensor
    size: int
    stride: int

    @property
    def nbytes(self) -> int:
        """Bytes of what tokens and ended blocks left."""
        blocks = int(ended_blocks(self.selected.lengths, self.size, self.stride).sum())
        compressed = blocks * 2 * self.keys.shape[1] * self.keys.shape[3] * self.keys.element_size()
        return compressed + self.tail.nbytes + self.selected.nbytes + self.window.nbytes

    def reserve(self, tokens: int) -> BlockSparseState:
        """Room for the keys and the compressed blocks of `tokens` tokens."""
        selected = self.selected.reserve(tokens)
        missing = ended_blocks(selected.capacity, self.size, self.stride) - self.keys.shape[2]
        if missing <= 0:
            return replace(self, selected=selected)
        keys, values = (nn.functional.pad(room, (0, 0, 0, missing)) for room in (self.keys, self.values))
        return replace(self, selected=selected, keys=keys, values=values)

    def with_blocks(self, keys: Tensor, values: Tensor, begun: Tensor, ended: Tensor) -> BlockSparseState:
        """The blocks from `begun` to `ended` [B], exclusive, written; the first of keys, values [B, G, N, D] is block
        `begun`."""
        slots = torch.arange(self.keys.shape[2], device=keys.device)
        from_call = slots - begun[:, None]
        is_new = ((from_call >= 0) & (slots < ended[:, None]))[:, None, :, None]
        index = from_call.clamp(0, keys.shape[2] - 1)[:, None, :, None].expand_as(self.keys)
        written = [
            updated(old, torch.where(is_new, new.to(old.dtype).gather(2, index), old))
            for old, new in ((self.keys, keys), (self.values, values))
        ]
        return replace(self, keys=written[0], values=written[1])


@register_mixer("block_sparse_attention")
class BlockSparseAttention(Mixer):
    """Native sparse attention: a gated sum of compressed, selected and sliding-window attention (arXiv 2502.11089).

    Every token is read coarsely, a few blocks finely and the last tokens always: the cost of a token grows with L / d,
    not with L, once the sequence is longer than the selected blocks. The defaults are the paper's; it gives no width of
    the compressing MLP and no positions.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: query heads.
        num_kv_heads: key-value heads, a divisor of num_heads: the heads of a group select the same blocks; None: one
            for every 16 heads, as the paper has it, at least one.
        head_dim: None: d_model / num_heads.
        compress_size: l, tokens of a compressed block.
        compress_stride: d, tokens from one compressed block to the next; divides compress_size and select_size.
        compress_hidden: width of the compressing MLPs; None: head_dim.
        select_size: l', tokens of a selection block.
        num_selected: n, blocks that a token selects, the fixed ones included.
        initial_blocks: blocks at a sequence's beginning that are always selected.
        local_blocks: blocks that are always selected, the token's own and those before it.
        window: tokens of the sliding window, a token's own included.
        position: none or rotary (arXiv 2104.09864; a compressed key stands where its block begins).
        rotary_base: of rotary.
        bias: of the projections.
        chunk_size: tokens worked on at a time; changes memory and speed, never the answer.
    """

    capabilities = Capabilities(keeps_keys=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        compress_size: int = 32,
        compress_stride: int = 16,
        compress_hidden: int | None = None,
        select_size: int = 64,
        num_selected: int = 16,
        initial_blocks: int = 1,
        local_blocks: int = 2,
        window: int = 512,
        position: Literal["none", "rotary"] = "none",
        rotary_base: float = 10000.0,
        bias: bool = False,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(d_model, causal)
        if head_dim is None and d_model % num_heads:
            raise ConfigError(f"{self.name}: d_model {d_model} is no multiple of num_heads {num_heads}; give head_dim")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or max(num_heads // 16, 1)
        self.head_dim = head_dim or d_model // num_heads
        self.sizes = BlockSizes(
            compress_size, compress_stride, select_size, num_selected, initial_blocks, local_blocks, window
        )
        self.position, self.rotary_base, self.chunk_size = position, rotary_base, chunk_size
        self._check()
        inner = num_heads * self.head_dim
        self.kv_width = self.num_kv_heads * self.head_dim
        # Queries and the keys that are rotated with them; values of these; what is compressed; gates.
        self.widths = [inner + 2 * self.kv_width, 2 * self.kv_width, 2 * self.kv_width, 3 * num_heads]
        self.project = nn.Linear(d_model, sum(self.widths), bias=bias)
        self.out = nn.Linear(inner, d_model, bias=bias)
        hidden = compress_hidden or self.head_dim
        self.compress_keys = BlockCompressor(self.num_kv_heads, compress_size, self.head_dim, hidden)
        self.compress_values = BlockCompressor(self.num_kv_heads, compress_size, self.head_dim, hidden)
        for weight in self.project.weight.split([inner, *[self.kv_width] * 6, 3 * num_heads]):
            nn.init.xavier_uniform_(weight)
        nn.init.xavier_uniform_(self.out.weight)
        for layer in (self.project, self.out) if bias else ():
            nn.init.zeros_(layer.bias)

    def _check(self) -> None:
        sizes, name = self.sizes, self.name
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{name}: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.position not in ("none", "rotary"):
            raise ConfigError(f'{name}: unknown position "{self.position}"')
        if self.position == "rotary" and self.head_dim % 2:
            raise ConfigError(f"{name}: rotary needs an even head_dim, found {self.head_dim}")
        for option, size in (("compress_size", sizes.compress), ("select_size", sizes.select)):
            if sizes.stride < 1 or size < 1 or size % sizes.stride:
                raise ConfigError(f"{name}: {option} {size} is no multiple of compress_stride {sizes.stride}")
        if sizes.local < 1 or sizes.initial < 0 or sizes.window < 1:
            raise ConfigError(f"{name}: local_blocks and window must be at least 1, initial_blocks at least 0")
        if sizes.count < sizes.initial + sizes.local:
            fixed = f"the {sizes.initial + sizes.local} that are always selected"
            raise ConfigError(f"{name}: num_selected {sizes.count} does not hold {fixed}")

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """The paper's sizes, and small ones: overlapping blocks or not, shared heads or not, every kind of choice."""
        return [
            {},
            {
                "num_kv_heads": 2,
                "compress_size": 4,
                "compress_stride": 2,
                "select_size": 4,
                "num_selected": 4,
                "window": 5,
                "position": "rotary",
                "chunk_size": 5,
            },
            {
                "compress_size": 6,
                "compress_stride": 2,
                "compress_hidden": 5,
                "select_size": 2,
                "num_selected": 5,
                "initial_blocks": 2,
                "local_blocks": 1,
                "window": 2,
                "bias": True,
                "chunk_size": 3,
            },
            {
                "num_kv_heads": 4,
                "head_dim": 6,
                "compress_size": 3,
                "compress_stride": 3,
                "select_size": 6,
                "num_selected": 3,
                "initial_blocks": 0,
                "window": 1,
                "position": "rotary",
            },
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The three branches."""
        return (BLOCK_SPARSE,)

    def no_weight_decay(self) -> set[str]:
        """The position embeddings."""
        return {"compress_keys.position", "compress_values.position"}

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> BlockSparseState:
        """Caches of the branches, an empty tail, and room for the compressed blocks."""
        heads, dim, sizes = self.num_kv_heads, self.head_dim, self.sizes
        room = (2, rows, heads, sizes.ended(capacity or 0), dim)
        keys, values = torch.zeros(room, dtype=dtype, device=device).unbind(0)
        return BlockSparseState(
            selected=make_cache(self.cache, rows, heads, dim, capacity, dtype, device),
            window=make_ring(self.cache, rows, heads, dim, sizes.window, 0, dtype, device),
            tail=torch.zeros(rows, sizes.compress - 1, 2 * self.kv_width, dtype=dtype, device=device),
            keys=keys,
            values=values,
            size=sizes.compress,
            stride=sizes.stride,
        )

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        length, kv_heads = x.shape[1], self.num_kv_heads
        assert state is None or isinstance(state, BlockSparseState)
        offset: Tensor | int = 0 if state is None else state.selected.offset
        positions = call_positions(length, ragged, offset, x.device)
        turned, straight, raw, gates = self.project(x).split(self.widths, dim=-1)
        turned = self._placed(turned.unflatten(-1, (-1, self.head_dim)).transpose(1, 2), positions)
        queries, *keys = turned.split([self.num_heads, kv_heads, kv_heads], dim=1)
        values = straight.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).chunk(2, dim=1)
        selected, window = zip(keys, values, strict=True)
        if state is None:
            after = None
            selected, window = as_kept(self.cache, *selected), as_kept(self.cache, *window)
            compressed, places = self._whole(raw, positions, ragged)
        else:
            compressed, selected, window, places, after = self._carried(raw, selected, window, positions, ragged, state)
        gates = gates.sigmoid().unflatten(-1, (-1, 3)).transpose(1, 2)
        mixed = block_sparse_attention(
            queries, compressed, selected, window, gates, places, self.sizes, self.chunk_size
        )
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y, after

    def _placed(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Queries and keys [B, *, L, D] rotated by their positions [B or 1, L]."""
        if self.position == "none":
            return heads
        precise = torch.promote_types(heads.dtype, torch.float32)
        frequencies = rotation_frequencies(self.head_dim, self.rotary_base, False, heads.device, precise)
        return rotate(heads, positions[..., None].to(precise) * frequencies)

    def _whole(self, raw: Tensor, positions: Tensor, ragged: Ragged | None) -> tuple[tuple[Tensor, Tensor], Places]:
        """Compressed keys and values of whole sequences, and where everything stands."""
        length, device = raw.shape[1], raw.device
        line = torch.arange(length, device=device)[None]
        if ragged is not None and ragged.is_packed:
            starts, skipped = packed_blocks(positions, self.sizes)
            places = Places(line, line, 0, length, line - positions, skipped)
            return self._compress(raw, starts, positions.gather(1, starts)), places
        starts = torch.arange(self.sizes.ended(length), device=device)[None] * self.sizes.stride
        return self._compress(raw, starts, starts), Places(line, line, 0, length)

    def _carried(
        self,
        raw: Tensor,
        selected: tuple[Tensor, Tensor],
        window: tuple[Tensor, Tensor],
        positions: Tensor,
        ragged: Ragged | None,
        state: BlockSparseState,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor], Places, BlockSparseState]:
        """What the branches read once the State has taken in the call, where it stands, and the State."""
        sizes, cache, length = self.sizes, state.selected, raw.shape[1]
        lengths = ragged.lengths if ragged is not None else None
        earlier, before, begun = cache.bound, cache.lengths.clone(), sizes.ended(cache.lengths)
        new = -(-length // sizes.stride)  # blocks that may end in this call
        if cache.uniform and lengths is None and not torch.compiler.is_compiling():  # one graph for every step
            new = sizes.ended(earlier + length) - sizes.ended(earlier)
        fine, cache = cache.append(*selected, lengths)
        near, ring = state.window.append(*window, lengths)
        line = extended(raw, state.tail, sizes.compress)
        tail = next_tail(state.tail, line, ragged)
        after = replace(state, selected=cache, window=ring, tail=tail).reserve(cache.capacity)
        if new:
            block = (begun[:, None] + torch.arange(new, device=raw.device)) * sizes.stride
            # Token 0 of the call lies at compress - 1 on the line.
            starts = (block - before[:, None] + sizes.compress - 1).clamp(max=line.shape[1] - sizes.compress)
            after = after.with_blocks(*self._compress(line, starts, block), begun, sizes.ended(cache.lengths))
        assert near.positions is not None
        places = Places(positions, near.positions, earlier, held=fine.keys.shape[2])
        # All the room of what is looked up: a part of it would have to be copied.
        return (after.keys, after.values), cache.room(), (near.keys, near.values), places, after

    def _compress(self, line: Tensor, starts: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """One key and one value [B, G, N, D] of each block.

        Args:
            line: [B, *, 2 G D] keys and values of tokens.
            starts: [B or 1, N] index of each block's first token on the line.
            positions: [B or 1, N] its position in its sequence.
        """
        size = self.sizes.compress
        index = (starts[:, :, None] + torch.arange(size, device=line.device)).flatten(1)
        shape = (len(line), starts.shape[1], size, 2, self.num_kv_heads, self.head_dim)
        keys, values = rows_at(line, index).view(shape).unbind(3)
        return self._placed(self.compress_keys(keys), positions), self.compress_values(values)

    def count_parameters(self) -> int:
        """d (h D + 6 g D + 3 h) + h D d, biases, and both compressing MLPs."""
        inner, bias = self.num_heads * self.head_dim, int(self.project.bias is not None)
        projections = (self.d_model + bias) * sum(self.widths) + (inner + bias) * self.d_model
        block, hidden = self.sizes.compress * self.head_dim, self.compress_keys.up.out_features
        pooling = (block + self.head_dim) * hidden + self.sizes.compress * self.kv_width
        return projections + 2 * pooling

    def flops(self, length: int, context: int = 0) -> int:
        """Projections; the MLPs for each block that ends; each chunk's scores of the compressed blocks that have ended
        by its last token; and 4 h D for each query-key pair of the other branches."""
        sizes, total = self.sizes, context + length
        inner, hidden = self.num_heads * self.head_dim, self.compress_keys.up.out_features
        projections = 2 * length * self.d_model * (sum(self.widths) + inner)
        blocks = self.num_kv_heads * (sizes.ended(total) - sizes.ended(context))
        pooling = 2 * 2 * blocks * hidden * self.head_dim * (sizes.compress + 1)
        coarse = 0
        for begin in range(context, total, self.chunk_size):
            end = min(begin + self.chunk_size, total)
            coarse += (end - begin) * sizes.ended(end)
        pairs = sum(sizes.selected_pairs(t) + min(t + 1, sizes.window) for t in range(context, total))
        return projections + pooling + 4 * inner * (coarse + pairs)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """2 g D elements for each token, each of the last w tokens, each compressed block, and the tail's l - 1; the
        first two in 8 bits, where asked for, with 2 g scales more."""
        sizes = self.sizes
        cached = (length + min(length, sizes.window)) * token_bytes(self.cache, self.num_kv_heads, self.head_dim, dtype)
        return cached + 2 * self.kv_width * (sizes.ended(length) + sizes.compress - 1) * dtype.itemsize
