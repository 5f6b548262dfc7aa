"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1).

    c_t = RMSNorm(W_c x_t),  r_t = rotated(W_r x_t)                                   all that a State holds of a token
    k_t,h = [U_h c_t; r_t],  v_t,h = V_h c_t,  [q_t,h; rotated(p_t,h)] = W_q x_t      or W_q' RMSNorm(W_q x_t)
    y_t = W_o concat_h( sum_s softmax_s(([q_t,h; p_t,h] . k_s,h) / sqrt(E + R)) v_s,h )

Two forms of one function. Expanded: keys and values of every head are made from the latents. Absorbed: queries and
outputs are moved into the latents' space, q . U c = (U^T q) . c and sum_s a_s V c_s = V (sum_s a_s c_s), and all heads
read the one sequence [c; r]. A call runs the form that needs less arithmetic, a step always the absorbed one.

Legend: B rows, L length, K keys, H heads, E head_dim, F value_dim, R rope_head_dim, C kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.cache import KVCache
from trilemma.nn.coded_cache import CodedCache, as_kept, make_cache, token_bytes
from trilemma.nn.norms import RMSNorm
from trilemma.nn.positions import rotate, rotation_frequencies
from trilemma.ops.attention import ATTEND, attend, attention_mask
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, call_positions, check_prefix
from trilemma.registry import register_mixer
from trilemma.state import State


class ReadMatrix(nn.Linear):
    """A linear layer whose weight the mixer also reads by itself: it is never packed or coded."""


@register_mixer("latent_attention")
class LatentAttention(Mixer):
    """Attention whose cache holds one narrow latent a token instead of keys and values of every head.

    Projections are drawn as those of `attention` are (Xavier), so that the two compare fairly; the paper's constant
    deviation of 0.006 belongs to its width of 5120.

    Args:
        d_model: width of input and output.
        causal: the direction.
        num_heads: H.
        head_dim: E, of queries and keys without the rotated part; None: d_model / num_heads.
        value_dim: F; None: head_dim.
        kv_lora_rank: C; None: 4 * head_dim, as in the paper.
        q_lora_rank: width of the queries' own latent, which saves weights; None: queries come straight from x.
        rope_head_dim: R, the part of the keys that all heads share; 0: none; None: half of head_dim, as in the paper.
        rotary: rotates that part by position. Without it the layer knows no positions, as in Kimi Linear (arXiv
            2510.26692), whose recurrent layers supply them.
        rotary_base: of the rotation, whose pairs are neighbours.
    """

    capabilities = Capabilities(bidirectional=True, prefix=True, rewinds=True, keeps_keys=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        head_dim: int | None = None,
        value_dim: int | None = None,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        rope_head_dim: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
    ) -> None:
        super().__init__(d_model, causal)
        if head_dim is None and d_model % num_heads:
            raise ConfigError(
                f"latent_attention: d_model {d_model} is no multiple of num_heads {num_heads}; give head_dim"
            )
        self.num_heads, self.head_dim = num_heads, head_dim or d_model // num_heads
        self.value_dim = value_dim or self.head_dim
        self.kv_lora_rank = kv_lora_rank or 4 * self.head_dim
        self.rope_head_dim = max(2, self.head_dim // 4 * 2) if rope_head_dim is None else rope_head_dim
        if rotary and self.rope_head_dim % 2:
            raise ConfigError(f"latent_attention: the rotation needs an even rope_head_dim, found {rope_head_dim}")
        self.rotary, self.rotary_base = rotary and self.rope_head_dim > 0, rotary_base
        self.scale = (self.head_dim + self.rope_head_dim) ** -0.5
        queries = num_heads * (self.head_dim + self.rope_head_dim)
        self.widths = [q_lora_rank or queries, self.kv_lora_rank, self.rope_head_dim]
        self.down = nn.Linear(d_model, sum(self.widths), bias=False)
        self.query_norm = RMSNorm(q_lora_rank) if q_lora_rank else None
        self.query_up = nn.Linear(q_lora_rank, queries, bias=False) if q_lora_rank else None
        self.latent_norm = RMSNorm(self.kv_lora_rank)
        self.up = ReadMatrix(self.kv_lora_rank, num_heads * (self.head_dim + self.value_dim), bias=False)
        self.out = nn.Linear(num_heads * self.value_dim, d_model, bias=False)
        layers = (self.query_up, self.up, self.out)
        drawn = [layer.weight for layer in layers if layer is not None]
        for weight in (*self.down.weight.split([width for width in self.widths if width]), *drawn):
            nn.init.xavier_uniform_(weight)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Latents wide (both forms are met) and narrow (absorbed throughout), with and without a shared part."""
        narrow = {"kv_lora_rank": 3, "q_lora_rank": 6, "value_dim": 6}
        return [
            {},
            narrow,
            {"q_lora_rank": 10, "kv_lora_rank": 20, "value_dim": 12, "rope_head_dim": 0},
            {"rotary": False, "rope_head_dim": 3, "head_dim": 6},
            {"causal": False},
            {"causal": False, "rope_head_dim": 0, **narrow},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """Scaled dot-product attention."""
        return (ATTEND,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache | CodedCache:
        """A growing or reserved cache of [c; r]; the values are part of the keys."""
        return make_cache(self.cache, rows, 1, self._kept_width, capacity, dtype, device, value_dim=0)

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        length = x.shape[1]
        assert state is None or isinstance(state, (KVCache, CodedCache))
        offset: Tensor | int = 0
        if state is not None:
            offset = state.offset
            check_prefix(ragged, length, offset)
        positions = call_positions(length, ragged, offset, x.device)
        queries, latents = self._projected(x, positions)
        prefix = ragged.prefix if ragged is not None and self.causal else None
        after: State | None = None
        if state is None:
            latents, _ = as_kept(self.cache, latents, latents[..., :0])
            valid = ragged.valid(length) if ragged is not None else None
            packed = ragged is not None and ragged.is_packed
            plain = valid is None or (self.causal and not packed)  # padding comes last: causal queries never see it
            key_positions = positions if valid is None else torch.where(valid, positions, -1)
        else:
            seen, after = state.append(latents, latents[..., :0], ragged.lengths if ragged is not None else None)
            latents = seen.keys.to(latents.dtype)
            held = latents.shape[2]
            plain = seen.positions is None and length in (1, held)
            key_positions = torch.arange(held, device=x.device)[None] if seen.positions is None else seen.positions
        mask = None
        if not plain or prefix is not None:
            segments = ragged.segments if ragged is not None else None
            mask = attention_mask(positions, key_positions, self.causal, None, prefix, segments, segments)
        form = self._absorbed if self._absorbs(length, latents.shape[2]) else self._expanded
        mixed = form(queries, latents, mask, is_causal=mask is None and self.causal and length > 1)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y, after

    def _projected(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, L, E + R] and latents [B, 1, L, C + R], rotated by their positions [B or 1, L]."""
        queries, latent, key = self.down(x).split(self.widths, dim=-1)
        if self.query_norm is not None and self.query_up is not None:
            queries = self.query_up(self.query_norm(queries))
        queries = queries.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        latent = self.latent_norm(latent)[:, None]
        if self.rope_head_dim == 0:
            return queries, latent
        key = key[:, None]
        if self.rotary:
            precise = torch.promote_types(x.dtype, torch.float32)
            frequencies = rotation_frequencies(self.rope_head_dim, self.rotary_base, False, x.device, precise)
            angles = positions[..., None].to(precise) * frequencies
            still, turning = queries.split([self.head_dim, self.rope_head_dim], dim=-1)
            queries, key = torch.cat([still, rotate(turning, angles)], dim=-1), rotate(key, angles)
        return queries, torch.cat([latent, key], dim=-1)

    def _absorbs(self, length: int, held: int) -> bool:
        """Whether the absorbed form runs, for `length` queries of `held` keys: for a single query, or where it is
        cheaper. It costs more for each pair, and projects the queries' side instead of every key and value held."""
        absorbed, expanded = self._pair_widths()
        projected = self.kv_lora_rank * (self.head_dim + self.value_dim)
        return length == 1 or length * held * (absorbed - expanded) < (held - length) * projected

    def _pair_widths(self) -> tuple[int, int]:
        """Multiply-adds of a query-key pair and head, absorbed and expanded. torch's fused kernels want values as wide
        as keys: the absorbed form mixes its keys whole, the expanded one pads."""
        keys = self.head_dim + self.rope_head_dim
        return 2 * (self.kv_lora_rank + self.rope_head_dim), keys + max(keys, self.value_dim)

    def _expanded(self, queries: Tensor, latents: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """[B, H, L, E + R], [B, 1, K, C + R] -> [B, H, L, F] by keys and values of every head."""
        latent, shared = latents.split([self.kv_lora_rank, self.rope_head_dim], dim=-1)
        both = self.up(latent[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys, values = both.split([self.head_dim, self.value_dim], dim=-1)
        keys = torch.cat([keys, shared.expand(-1, self.num_heads, -1, -1)], dim=-1)
        values = nn.functional.pad(values, (0, max(0, keys.shape[-1] - self.value_dim)))
        return attend(queries, keys, values, mask, is_causal=is_causal, scale=self.scale)[..., : self.value_dim]

    def _absorbed(self, queries: Tensor, latents: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """As `_expanded`, in the latents' space: all heads read one sequence of keys, which are also the values."""
        weight = self.up.weight.view(self.num_heads, -1, self.kv_lora_rank)
        key_up, value_up = weight.split([self.head_dim, self.value_dim], dim=1)
        still, turning = queries.split([self.head_dim, self.rope_head_dim], dim=-1)
        queries = torch.cat([torch.einsum("bhle,hec->bhlc", still, key_up), turning], dim=-1)
        single = queries.shape[2] == 1  # its heads are more queries of one head: the keys are gone through once
        if single:
            queries = queries.transpose(1, 2)
        mixed = attend(queries, latents, latents, mask, is_causal=is_causal, scale=self.scale)
        if single:
            mixed = mixed.transpose(1, 2)
        return torch.einsum("bhlc,hfc->bhlf", mixed[..., : self.kv_lora_rank], value_up)

    def count_parameters(self) -> int:
        """d (q + C + R) + C (h (E + F) + 1) + d h F; q is h (E + R), or a rank with q (h (E + R) + 1) more."""
        queries = self.num_heads * (self.head_dim + self.rope_head_dim)
        count = self.d_model * sum(self.widths) + self.kv_lora_rank * (self.up.out_features + 1)
        count += self.d_model * self.num_heads * self.value_dim
        return count + (self.widths[0] * (queries + 1) if self.query_up is not None else 0)

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, and the form that a call of this length runs."""
        held = length + context
        weights = self.d_model * (sum(self.widths) + self.num_heads * self.value_dim)
        if self.query_up is not None:
            weights += self.widths[0] * self.query_up.out_features
        pairs = length * context + length * (length + 1) // 2 if self.causal else length**2
        absorbs, (absorbed, expanded) = self._absorbs(length, held), self._pair_widths()
        projected = (length if absorbs else held) * self.kv_lora_rank * (self.head_dim + self.value_dim)
        mixed = pairs * (absorbed if absorbs else expanded)
        return 2 * (length * weights + self.num_heads * (projected + mixed))

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """C + R elements a token; in 8 bits a scale more."""
        return length * token_bytes(self.cache, 1, self._kept_width, dtype, value_dim=0)

    @property
    def _kept_width(self) -> int:
        return self.kv_lora_rank + self.rope_head_dim
