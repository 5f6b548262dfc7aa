"""Cross-attention: queries from the decoder, keys and values from a memory ("Attention Is All You Need", section
3.2.3).

The memory is a State, in training too: computed once by `remember`, differentiable, read-only for the reader,
appendable by its producer. Hypotheses of one source share it without a copy.

Legend: B rows, S sources, L length, K memory length, H heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, MemoryMixer
from trilemma.nn.cache import KVCache
from trilemma.nn.coded_cache import CodedCache, make_cache, token_bytes
from trilemma.ops.attention import ATTEND, attend, attention_mask
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State


@dataclass
class Memory(State):
    """Keys and values of S sources, read by B rows.

    Attributes:
        cache: keys and values, [S, G, K, D].
        source: [B] which source a row reads.
        group: rows of one source where every source has equally many, side by side, in order; 0 otherwise.
    """

    cache: KVCache | CodedCache
    source: Tensor
    group: int

    def select(self, rows: Tensor) -> Memory:
        """Rows of a new batch. Keys and values are copied only when a source is no longer read."""
        source = self.source.index_select(0, rows)
        used, renumbered = torch.unique(source, return_inverse=True)
        cache = self.cache if len(used) == len(self.cache.lengths) else self.cache.select(used)
        group = len(rows) // len(used) if len(used) else 0
        regular = torch.arange(len(rows), device=rows.device) // max(group, 1)
        is_grouped = group * len(used) == len(rows) and bool((renumbered == regular).all())
        return Memory(cache, renumbered, group if is_grouped else 0)

    def rewind(self, counts: Tensor) -> Memory:
        """The reader appends nothing, so there is nothing to take back."""
        return self

    def reserve(self, tokens: int) -> Memory:
        """The memory does not grow with the reader's tokens."""
        return self


@register_mixer("cross_attention")
class CrossAttention(MemoryMixer):
    """Attention over a memory.

    Args:
        d_model: width of queries and output.
        causal: accepted for symmetry; the direction has no meaning here.
        num_heads, num_kv_heads, head_dim, scale, bias: as in `attention`.
        memory_width: width of the memory; None: d_model.
    """

    capabilities = Capabilities(causal=False, reads_memory=True, prefix=True, rewinds=True, keeps_keys=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        memory_width: int | None = None,
        scale: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, causal)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if head_dim is None and d_model % num_heads:
            raise ConfigError(f"cross_attention: d_model {d_model} is no multiple of num_heads {num_heads}")
        if num_heads % self.num_kv_heads:
            raise ConfigError(f"cross_attention: num_heads {num_heads} is no multiple of {self.num_kv_heads}")
        self.head_dim = head_dim or d_model // num_heads
        self.scale = scale
        self.memory_width = memory_width or d_model
        self.kv_width = self.num_kv_heads * self.head_dim
        inner = num_heads * self.head_dim
        self.query = nn.Linear(d_model, inner, bias=bias)
        self.key_value = nn.Linear(self.memory_width, 2 * self.kv_width, bias=bias)
        self.out = nn.Linear(inner, d_model, bias=bias)
        for weight in (self.query.weight, *self.key_value.weight.chunk(2), self.out.weight):
            nn.init.xavier_uniform_(weight)
        for layer in (self.query, self.key_value, self.out) if bias else ():
            nn.init.zeros_(layer.bias)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Head sharing, another memory width, no biases."""
        return [{}, {"num_kv_heads": 1, "memory_width": 12}, {"num_kv_heads": 2, "bias": False, "scale": 1.0}]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """Scaled dot-product attention."""
        return (ATTEND,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> Memory:
        """A memory without tokens; `remember` fills it."""
        cache = make_cache(self.cache, rows, self.num_kv_heads, self.head_dim, capacity, dtype, device)
        return Memory(cache, torch.arange(rows, device=device), 1)

    def remember(self, memory: Tensor, lengths: Tensor | None = None, state: Memory | None = None) -> Memory:
        """The State that holds a memory, or `state` with more of it.

        Args:
            memory: [S, K, memory_width], right-padded.
            lengths: [S] valid positions, or None.
            state: a State to append to, read by its sources one to one.
        """
        batch, length, _ = memory.shape
        memory = zero_padding(memory, None if lengths is None else Ragged(lengths=lengths).valid(length))
        keys, values = self.key_value(memory).view(batch, length, 2, self.num_kv_heads, self.head_dim).unbind(2)
        if state is None:
            empty = make_cache(self.cache, batch, self.num_kv_heads, self.head_dim, None, keys.dtype, keys.device)
            state = Memory(empty.reserve(length), torch.arange(batch, device=keys.device), 1)
        _, cache = state.cache.append(keys.transpose(1, 2), values.transpose(1, 2), lengths)
        return replace(state, cache=cache)

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`; the State is returned as it came."""
        assert isinstance(state, Memory)
        batch, length, _ = x.shape
        cache = state.cache
        seen, group = cache.held(), state.group
        keys, values, where = seen.keys, seen.values, seen.positions
        if group == 0:
            keys, values = keys.index_select(0, state.source), values.index_select(0, state.source)
            where, group = None if where is None else where.index_select(0, state.source), 1
        # Rows of one source are just more queries of it.
        queries = self.query(x).view(batch // group, group * length, self.num_heads, self.head_dim).transpose(1, 2)
        mask = None
        if where is not None:
            mask = attention_mask(where[:, :1], where, causal=False)
            mask = mask.expand(-1, -1, group * length, -1)
        mixed = attend(queries, keys.to(queries.dtype), values.to(queries.dtype), mask, scale=self.scale)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return y, state

    def count_parameters(self) -> int:
        """As self-attention, with keys and values from the memory's width."""
        inner, bias = self.num_heads * self.head_dim, int(self.query.bias is not None)
        count = inner * (self.d_model + bias) + 2 * self.kv_width * (self.memory_width + bias)
        return count + self.d_model * (inner + bias)

    def flops(self, length: int, context: int = 0) -> int:
        """`context` is the memory's length; its projection is `memory_flops`."""
        inner = self.num_heads * self.head_dim
        return 4 * length * self.d_model * inner + 4 * inner * length * context

    def memory_flops(self, length: int) -> int:
        """FLOPs of `remember` for one source of `length` positions."""
        return 4 * length * self.memory_width * self.kv_width

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """`length` is the memory's."""
        return length * token_bytes(self.cache, self.num_kv_heads, self.head_dim, dtype)
