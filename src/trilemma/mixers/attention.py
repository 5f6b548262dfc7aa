"""Multi-head attention ("Attention Is All You Need", Vaswani et al. 2017, arXiv 1706.03762, section 3.2).

    y = concat_h( softmax(Q_h K_h^T / sqrt(head_dim)) V_h ) W_O

with multi-query and grouped-query keys (arXiv 1911.02150, 2305.13245), full or sliding window, causal, bidirectional
or with a prefix, and positions by rotation (RoPE, arXiv 2104.09864; xPos, arXiv 2212.10554) or by bias (ALiBi, arXiv
2108.12409; T5, arXiv 1910.10683).

Legend: B rows, L length, H heads, G key-value heads, D head_dim, K keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError, LengthError
from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.cache import KeyValues, KVCache, RingCache
from trilemma.nn.coded_cache import CodedCache, CodedRing, as_kept, make_cache, make_ring, token_bytes
from trilemma.nn.norms import RMSNorm
from trilemma.nn.positions import (
    RotaryScaling,
    alibi_slopes,
    rotate,
    rotation_frequencies,
    scaled_frequencies,
    t5_buckets,
    xpos_scale,
)
from trilemma.ops.attention import ATTEND, attend, attention_mask
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, call_positions, check_prefix
from trilemma.registry import register_mixer
from trilemma.state import State

_T5_BUCKETS = 32


@register_mixer("attention")
class Attention(Mixer):
    """Self-attention.

    Args:
        d_model: width.
        causal: the direction.
        num_heads: query heads.
        num_kv_heads: key-value heads, a divisor of num_heads; None: num_heads. 1 is multi-query attention.
        head_dim: None: d_model / num_heads.
        window: a token sees the `window` last tokens, its own included; None: all.
        position: none, rotary, xpos, alibi or t5 (a bias learned by this layer) or t5-shared (one owned by the stack).
        rotary_base: of rotary and xpos.
        rotary_interleaved: pairs of neighbours; False: the halves, as Llama's weights have it.
        rotary_dim: how many features of a head, the first ones, are rotated; None: all.
        rotary_scaling: slower rotations for longer texts, a mapping with kind (linear, llama3 or yarn), factor,
            original_length, low, high, rounded and magnitude, see `trilemma.nn.positions.RotaryScaling`; None: none.
        xpos_base: distance over which xPos decays by one power of zeta.
        qk_norm: RMS-normalises queries and keys per head.
        scale: of the scores; None: 1 / sqrt(head_dim). T5 uses 1.
        output_gate: each head's output is multiplied by sigmoid(W_g x), feature by feature (Qiu et al. 2025, arXiv
            2505.06708).
        bias: of the projections.
    """

    capabilities = Capabilities(causal=True, bidirectional=True, prefix=True, rewinds=True, keeps_keys=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        position: Literal["none", "rotary", "xpos", "alibi", "t5", "t5-shared"] = "none",
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = True,
        rotary_dim: int | None = None,
        rotary_scaling: RotaryScaling | None = None,
        xpos_base: float = 512.0,
        qk_norm: bool = False,
        scale: float | None = None,
        output_gate: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, causal)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        if head_dim is None and d_model % num_heads:
            raise ConfigError(f"attention: d_model {d_model} is no multiple of num_heads {num_heads}; give head_dim")
        self.head_dim = head_dim or d_model // num_heads
        self.window = window
        self.position = position
        self.rotary_base, self.rotary_interleaved, self.xpos_base = rotary_base, rotary_interleaved, xpos_base
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        self.rotary_scaling = rotary_scaling
        self.scale = scale
        self._check()
        inner = self.num_heads * self.head_dim
        self.kv_width = self.num_kv_heads * self.head_dim
        self.gate_width = inner if output_gate else 0
        widths = [inner, self.kv_width, self.kv_width, self.gate_width]
        self.qkv = nn.Linear(d_model, sum(widths), bias=bias)  # and the gate
        self.out = nn.Linear(inner, d_model, bias=bias)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.t5_bias = nn.Parameter(torch.zeros(_T5_BUCKETS, num_heads)) if position == "t5" else None
        for weight in self.qkv.weight.split([width for width in widths if width]):
            nn.init.xavier_uniform_(weight)
        nn.init.xavier_uniform_(self.out.weight)
        for layer in (self.qkv, self.out) if bias else ():
            nn.init.zeros_(layer.bias)

    def _check(self) -> None:
        if self.position not in ("none", "rotary", "xpos", "alibi", "t5", "t5-shared"):
            raise ConfigError(f'attention: unknown position "{self.position}"')
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"attention: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.position in ("rotary", "xpos") and self.head_dim % 2:
            raise ConfigError(f"attention: {self.position} needs an even head_dim, found {self.head_dim}")
        partial = self.rotary_dim != self.head_dim
        if partial and (self.position != "rotary" or self.rotary_dim % 2 or not 0 < self.rotary_dim < self.head_dim):
            raise ConfigError(
                f"attention: rotary_dim needs position rotary and an even number of a head's {self.head_dim} features, "
                f'found {self.rotary_dim} with position "{self.position}"'
            )
        if self.position != "rotary" and self.rotary_scaling is not None:
            raise ConfigError(f'attention: rotary_scaling belongs to position rotary, found "{self.position}"')
        if self.rotary_scaling is not None and self.rotary_base <= 1:
            raise ConfigError(f"attention: rotary_scaling needs a rotary_base above 1, found {self.rotary_base}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"attention: window must be at least 1, found {self.window}")

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Each position, head sharing, window and direction."""
        return [
            {"position": "rotary"},
            {"position": "none"},
            {"num_kv_heads": 1, "position": "rotary", "rotary_interleaved": False, "bias": False},
            {"num_kv_heads": 2, "window": 5, "position": "rotary", "qk_norm": True},
            {"position": "xpos", "xpos_base": 64.0, "head_dim": 6},
            {"position": "alibi"},
            {"position": "alibi", "window": 7},
            {"position": "t5", "scale": 1.0},
            {"position": "t5-shared", "num_kv_heads": 2},
            {"window": 2},
            {"causal": False},
            {"causal": False, "position": "rotary", "num_kv_heads": 2},
            {"causal": False, "position": "t5", "window": 4},
            {"causal": False, "position": "alibi"},
            {"position": "rotary", "rotary_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 50}},
            {"position": "rotary", "rotary_dim": 4, "head_dim": 6, "num_kv_heads": 2, "output_gate": True},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """Scaled dot-product attention."""
        return (ATTEND,)

    def shared_inputs(self) -> Mapping[str, tuple[int, ...]]:
        """T5's bias, where the stack owns it."""
        return {"t5_bias": (_T5_BUCKETS, self.num_heads)} if self.position == "t5-shared" else {}

    def no_weight_decay(self) -> set[str]:
        """The bias table."""
        return {"t5_bias"} if self.t5_bias is not None else set()

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache | RingCache | CodedCache | CodedRing:
        """A growing or reserved cache; a ring where there is a window."""
        if self.window is not None:
            return make_ring(self.cache, rows, self.num_kv_heads, self.head_dim, self.window, rewind, dtype, device)
        return make_cache(self.cache, rows, self.num_kv_heads, self.head_dim, capacity, dtype, device)

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        batch, length, _ = x.shape
        assert state is None or isinstance(state, (KVCache, RingCache, CodedCache, CodedRing))
        valid = ragged.valid(length) if ragged is not None else None
        offset: Tensor | int = 0 if state is None else state.offset
        positions = call_positions(length, ragged, offset, x.device)
        inner = self.num_heads * self.head_dim
        projected, gate = self.qkv(x), None
        if self.gate_width:
            projected, gate = projected.split([inner + 2 * self.kv_width, inner], dim=-1)
        heads = projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # of queries, keys, values
        matched, values = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        queries, keys = self._placed(matched, positions)
        if state is None:
            keys, values = as_kept(self.cache, keys, values)
            mixed = self._attend_call(queries, keys, values, positions, ragged, valid, shared)
            after: State | None = None
        else:
            check_prefix(ragged, length, offset)
            seen, after = state.append(keys, values, ragged.lengths if ragged is not None else None)
            mixed = self._attend_state(queries, seen, positions, ragged, offset, shared)
        mixed = mixed.transpose(1, 2).reshape(batch, length, inner)
        y: Tensor = self.out(mixed if gate is None else mixed * torch.sigmoid(gate))
        return y, after

    def _placed(self, matched: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H + G, L, D], normalised where asked for and rotated by their positions [B or 1, L]."""
        counts = [self.num_heads, self.num_kv_heads]
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = matched.split(counts, dim=1)
            matched = torch.cat([self.query_norm(queries), self.key_norm(keys)], dim=1)
        if self.position in ("rotary", "xpos"):
            precise = torch.promote_types(matched.dtype, torch.float32)
            angles = positions[..., None].to(precise) * self._frequencies(matched.device, precise)
            if self.position == "rotary":
                matched = self._rotated(matched, angles)
            else:
                _check_xpos(positions, self.xpos_base)
                scales = (xpos_scale(positions, self.head_dim, self.xpos_base, sign, precise) for sign in (1, -1))
                parts = zip(matched.split(counts, dim=1), scales, strict=True)
                matched = torch.cat([rotate(part, angles, self.rotary_interleaved, to) for part, to in parts], dim=1)
        queries, keys = matched.split(counts, dim=1)
        return queries, keys

    def _frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[rotary_dim / 2] radians per position."""
        if self.rotary_scaling is None:
            return rotation_frequencies(self.rotary_dim, self.rotary_base, False, device, dtype)
        return scaled_frequencies(self.rotary_dim, self.rotary_base, self.rotary_scaling, device, dtype)

    def _rotated(self, heads: Tensor, angles: Tensor) -> Tensor:
        """[B, H, L, D] with the first rotary_dim features rotated by the angles [B or 1, L, rotary_dim / 2]."""
        turning = rotate(heads[..., : self.rotary_dim], angles, self.rotary_interleaved)
        if self.rotary_scaling is not None and self.rotary_scaling.size != 1:
            turning = turning * self.rotary_scaling.size
        if self.rotary_dim == self.head_dim:
            return turning
        return torch.cat([turning, heads[..., self.rotary_dim :]], dim=-1)

    def _attend_call(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        ragged: Ragged | None,
        valid: Tensor | None,
        shared: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Whole sequences: the call's own keys are all there is."""
        packed = ragged is not None and ragged.is_packed
        prefix = ragged.prefix if ragged is not None and self.causal else None
        windowed = self.window is not None and self.window < keys.shape[2]
        plain = not (packed or windowed or prefix is not None or self._has_bias)
        if plain and (self.causal or valid is None):  # padding comes last: causal queries never see it
            return attend(queries, keys, values, is_causal=self.causal, scale=self.scale)
        key_positions = positions if valid is None else torch.where(valid, positions, -1)
        segments = ragged.segments if ragged is not None else None
        mask = attention_mask(positions, key_positions, self.causal, self.window, prefix, segments, segments)
        return attend(
            queries, keys, values, mask, self._bias(positions, positions, shared, queries.dtype), scale=self.scale
        )

    def _attend_state(
        self,
        queries: Tensor,
        seen: KeyValues,
        positions: Tensor,
        ragged: Ragged | None,
        offset: Tensor | int,
        shared: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Queries [B, H, L, D] over all that the State holds, the call's keys included."""
        length, held = queries.shape[2], seen.keys.shape[2]
        keys, values = seen.keys.to(queries.dtype), seen.values.to(queries.dtype)
        prefix = ragged.prefix if ragged is not None else None
        if seen.positions is None and not self._has_bias and prefix is None:
            if length == 1:  # the newest token sees every key
                return attend(queries, keys, values, scale=self.scale)
            if offset == 0 and isinstance(offset, int) and length == held:
                return attend(queries, keys, values, is_causal=True, scale=self.scale)
        key_positions = seen.positions
        if key_positions is None:
            key_positions = torch.arange(held, device=queries.device)[None, :]
        mask = attention_mask(positions, key_positions, True, self.window, prefix)
        return attend(
            queries, keys, values, mask, self._bias(positions, key_positions, shared, queries.dtype), scale=self.scale
        )

    @property
    def _has_bias(self) -> bool:
        return self.position in ("alibi", "t5", "t5-shared")

    def _bias(
        self, query_positions: Tensor, key_positions: Tensor, shared: Mapping[str, Tensor] | None, dtype: torch.dtype
    ) -> Tensor | None:
        """[B or 1, H, L, K] added to the scores, or None."""
        if not self._has_bias:
            return None
        distance = key_positions[:, None, :] - query_positions[:, :, None]
        if self.position == "alibi":
            precise = torch.promote_types(dtype, torch.float32)
            slopes = torch.tensor(alibi_slopes(self.num_heads), device=distance.device, dtype=precise)
            return -distance.abs()[:, None].to(slopes.dtype) * slopes[:, None, None]
        if self.t5_bias is not None:
            table: Tensor = self.t5_bias
        elif shared is not None and "t5_bias" in shared:
            table = shared["t5_bias"]
        else:
            raise ConfigError("attention: position t5-shared needs the stack's t5_bias")
        return table[t5_buckets(distance, self.causal, _T5_BUCKETS)].permute(0, 3, 1, 2)

    def count_parameters(self) -> int:
        """(h d_h + 2 g d_h) (d + bias) + d (h d_h + bias), plus gate, norms and bias table."""
        inner, bias = self.num_heads * self.head_dim, int(self.qkv.bias is not None)
        count = (inner + 2 * self.kv_width + self.gate_width) * (self.d_model + bias) + self.d_model * (inner + bias)
        if self.query_norm is not None:
            count += 2 * self.head_dim
        return count + (_T5_BUCKETS * self.num_heads if self.position == "t5" else 0)

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, and 4 h d_h for each query-key pair that is needed."""
        inner = self.num_heads * self.head_dim
        projections = 2 * length * self.d_model * (2 * inner + 2 * self.kv_width + self.gate_width)
        if self.causal:
            window = self.window or length + context
            pairs = sum(min(context + i + 1, window) for i in range(length))
        else:
            window = self.window or length
            pairs = sum(min(i + window, length) - max(i - window + 1, 0) for i in range(length))
        return projections + 4 * inner * pairs

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """2 g d_h elements a token held; in 8 bits 2 g scales more."""
        held = length if self.window is None else min(length, self.window)
        return held * token_bytes(self.cache, self.num_kv_heads, self.head_dim, dtype)


def _check_xpos(positions: Tensor, base: float) -> None:
    """Beyond 70 * base the decay of a query leaves float32's range."""
    if torch.compiler.is_compiling() or positions.numel() == 0:  # reading values would break the graph
        return
    last = int(positions.max())
    if last > 70 * base:
        limit = f"at most {70 * base:g}; raise it"
        raise LengthError(f"position {last} is too far for xPos with xpos_base {base:g}: {limit}")
