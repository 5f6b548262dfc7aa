"""One key-value cache for many layers ("You Only Cache Once", Sun et al. 2024, arXiv 2405.05254, section 2).

    K, V = M W_K, M W_V                                  once, by the first such layer, from its own input M
    y = concat_h( softmax(Q_h K^T / sqrt(head_dim)) V ) W_O,    Q = x W_Q         in every such layer

The layers below, of constant State (gated retention, a window), encode; these layers look back at what came out of
them. So a model keeps one cache where attention keeps one a layer.

Legend: B rows, L length, H heads, G key-value heads, D head_dim, K keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer, Shared
from trilemma.nn.cache import KVCache
from trilemma.nn.coded_cache import CodedCache, as_kept, make_cache, token_bytes
from trilemma.nn.positions import rotate, rotation_frequencies
from trilemma.ops.attention import ATTEND, attend, attention_mask
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, call_positions, check_prefix
from trilemma.registry import register_mixer
from trilemma.state import NoState, State


@dataclass(frozen=True)
class View:
    """What the layers of one call look at.

    Attributes:
        keys, values: [B, G, K, D] of all tokens read, the call's included; keys are rotated.
        mask: [B or 1, 1, L, K] which key each query may look at; None: all of them, or with `is_causal` the triangle.
        is_causal: the call's own keys are all there is, and nothing needs a mask.
        angles: [B or 1, L, D / 2] by which queries are rotated, or None.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    is_causal: bool
    angles: Tensor | None


@register_mixer("yoco")
class YOCO(Mixer):
    """Attention to one cache that all layers of this kind share: the first of them in a stack writes it.

    For the upper half of a stack: `mixer: [gated_retention, gated_retention, yoco, yoco]`, named layer by layer, since
    a shorter list is repeated.

    Args:
        d_model: width.
        causal: the direction.
        num_heads: query heads.
        num_kv_heads: key-value heads, a divisor of num_heads; None: num_heads. The same in all layers.
        head_dim: None: d_model / num_heads.
        position: none, or rotary (RoPE, arXiv 2104.09864).
        rotary_base: of rotary.
        bias: of the projections.
        producer: this layer writes the cache; all others have only queries and an output projection.
    """

    capabilities = Capabilities(causal=True, bidirectional=True, prefix=True, rewinds=True, keeps_keys=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        position: Literal["none", "rotary"] = "rotary",
        rotary_base: float = 10000.0,
        bias: bool = False,
        producer: bool = True,
    ) -> None:
        super().__init__(d_model, causal)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if head_dim is None and d_model % num_heads:
            raise ConfigError(f"yoco: d_model {d_model} is no multiple of num_heads {num_heads}; give head_dim")
        if num_heads % self.num_kv_heads:
            raise ConfigError(f"yoco: num_heads {num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        self.head_dim = head_dim or d_model // num_heads
        self.position, self.rotary_base = position, rotary_base
        if position == "rotary" and self.head_dim % 2:
            raise ConfigError(f"yoco: rotary needs an even head_dim, found {self.head_dim}")
        self.inner, self.kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(d_model, self.inner, bias=bias)
        self.key_value = nn.Linear(d_model, 2 * self.kv_width, bias=bias) if producer else None
        self.out = nn.Linear(self.inner, d_model, bias=bias)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                for weight in parameter.chunk(2) if name.startswith("key_value") else (parameter,):
                    nn.init.xavier_uniform_(weight)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Writer and reader: head sharing, positions, both directions."""
        return [
            {"num_kv_heads": 2},
            {"num_kv_heads": 2, "producer": False},
            {"position": "none", "bias": True},
            {"position": "none", "head_dim": 6, "num_kv_heads": 1, "producer": False},
            {"causal": False},
            {"causal": False, "bias": True, "producer": False},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """Scaled dot-product attention."""
        return (ATTEND,)

    @property
    def _cache(self) -> dict[str, str]:
        rotated = f"rotated by base {self.rotary_base:g}" if self.position == "rotary" else "without positions"
        return {"yoco_cache": f"a cache of {self.num_kv_heads} x {self.head_dim}, {rotated}"}

    def publishes(self) -> Mapping[str, str]:
        """The cache as this call sees it (`View`)."""
        return self._cache if self.key_value is not None else {}

    def reads(self) -> Mapping[str, str]:
        """The cache as this call sees it (`View`)."""
        return self._cache if self.key_value is None else {}

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache | CodedCache | NoState:
        """The cache, in the layer that writes it."""
        if self.key_value is None:
            return NoState()
        return make_cache(self.cache, rows, self.num_kv_heads, self.head_dim, capacity, dtype, device)

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert shared is not None
        batch, length, _ = x.shape
        if self.key_value is not None:
            shared["yoco_cache"], state = self._written(self.key_value(x), state, ragged)
        view = shared["yoco_cache"]
        queries = self.query(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        if view.angles is not None:
            queries = rotate(queries, view.angles)
        mixed = attend(queries, view.keys, view.values, view.mask, is_causal=view.is_causal)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, self.inner))
        return y, state

    def _written(self, key_value: Tensor, state: State | None, ragged: Ragged | None) -> tuple[View, State | None]:
        """The cache with the call's keys and values [B, L, 2 G D] in it."""
        assert state is None or isinstance(state, (KVCache, CodedCache))
        batch, length, _ = key_value.shape
        valid = ragged.valid(length) if ragged is not None else None
        offset: Tensor | int = 0 if state is None else state.offset
        positions = call_positions(length, ragged, offset, key_value.device)
        keys, values = key_value.view(batch, length, 2, self.num_kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        angles = self._angles(positions, key_value.dtype)
        if angles is not None:
            keys = rotate(keys, angles)
        prefix = ragged.prefix if ragged is not None and self.causal else None
        if state is None:
            keys, values = as_kept(self.cache, keys, values)
            segments = ragged.segments if ragged is not None else None
            # Padding comes last: causal queries never see it.
            if segments is None and prefix is None and (self.causal or valid is None):
                return View(keys, values, None, self.causal, angles), None
            held = positions if valid is None else torch.where(valid, positions, -1)
            mask = attention_mask(positions, held, self.causal, None, prefix, segments, segments)
            return View(keys, values, mask, False, angles), None
        check_prefix(ragged, length, offset)
        seen, after = state.append(keys, values, ragged.lengths if ragged is not None else None)
        keys, values = seen.keys.to(keys.dtype), seen.values.to(values.dtype)
        if seen.positions is None and prefix is None:
            if length == 1:  # the newest token sees every key
                return View(keys, values, None, False, angles), after
            if keys.shape[2] == length:
                return View(keys, values, None, True, angles), after
        places = seen.positions
        if places is None:
            places = torch.arange(keys.shape[2], device=keys.device)[None, :]
        return View(keys, values, attention_mask(positions, places, True, None, prefix), False, angles), after

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[B or 1, L, D / 2]."""
        if self.position == "none":
            return None
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        frequencies = rotation_frequencies(self.head_dim, self.rotary_base, False, positions.device, precise)
        return positions[..., None].to(precise) * frequencies

    def count_parameters(self) -> int:
        """2 h d_h d, in the writer (d + bias) 2 g d_h more."""
        bias = int(self.query.bias is not None)
        count = self.inner * (self.d_model + bias) + self.d_model * (self.inner + bias)
        return count + (2 * self.kv_width * (self.d_model + bias) if self.key_value is not None else 0)

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, and 4 h d_h for each query-key pair that is needed."""
        width = 2 * self.inner + (2 * self.kv_width if self.key_value is not None else 0)
        pairs = length * context + length * (length + 1) // 2 if self.causal else length * length
        return 2 * length * self.d_model * width + 4 * self.inner * pairs

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """2 g d_h elements a token in the writer, nothing in the others."""
        if self.key_value is None:
            return 0
        return length * token_bytes(self.cache, self.num_kv_heads, self.head_dim, dtype)
