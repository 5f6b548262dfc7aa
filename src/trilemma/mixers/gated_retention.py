"""Gated retention (gRetNet, also RetNet-3; Sun et al. 2024, "You Only Cache Once", arXiv 2405.05254).

    gamma_t = sigmoid(x_t W_gamma)^(1/16)                 one a head and token; RetNet: one a head
    S_t = gamma_t S_{t-1} + K_t^T V_t                     Q, K rotated by position, K / sqrt(E)
    y = (swish(X W_G) * RMSNorm_h(Q_t S_t)) W_O

The chunkwise form is parallel within chunks and recurrent between them, as in retention.

Legend: B rows, L length, H heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.positions import rotate, rotation_frequencies
from trilemma.ops.decayed_scan import DECAYED_SCAN, decayed_scan, decayed_scan_flops
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, call_positions, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class GatedRetentionState(State):
    """What gated retention remembers.

    Attributes:
        matrix: [B, H, E, E], float32 at least.
        lengths: [B] tokens read, for the rotation.
    """

    matrix: Tensor
    lengths: Tensor


@register_mixer("gated_retention")
class GatedRetention(Mixer):
    """Retention whose decay depends on the token; the self-decoder of YOCO (arXiv 2405.05254, section 3.2).

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: heads.
        head_dim: E; None: d_model / num_heads.
        temperature: gamma = sigmoid(.)^(1 / temperature); the larger, the longer the memory.
        chunk_size: of the chunkwise form; changes speed, never the answer.
        epsilon: of the heads' RMSNorm, which has no weights.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        head_dim: int | None = None,
        temperature: float = 16.0,
        chunk_size: int = 64,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        if head_dim is None and d_model % num_heads:
            raise ConfigError(
                f"gated_retention: d_model {d_model} is no multiple of num_heads {num_heads}; give head_dim"
            )
        self.num_heads, self.head_dim = num_heads, head_dim or d_model // num_heads
        if self.head_dim % 2:
            raise ConfigError(f"gated_retention: the rotation needs an even head_dim, found {self.head_dim}")
        self.temperature, self.chunk_size, self.epsilon = temperature, chunk_size, epsilon
        inner = num_heads * self.head_dim
        self.widths = [inner] * 4 + [num_heads]  # queries, keys, values, output gate, decay
        self.project = nn.Linear(d_model, sum(self.widths), bias=False)
        self.out = nn.Linear(inner, d_model, bias=False)
        for weight in self.project.weight.split(self.widths):  # the published code's initialisation
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out.weight, gain=2**-1)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Chunks of 64, 7, 1 and longer than any sequence of the laws; sharp decays; heads narrower than the model."""
        return [
            {},
            {"chunk_size": 7, "temperature": 0.5},
            {"chunk_size": 1, "head_dim": 6},
            {"chunk_size": 1000},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The decayed scan."""
        return (DECAYED_SCAN,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> GatedRetentionState:
        """Zeros."""
        precise = torch.promote_types(dtype, torch.float32)
        matrix = torch.zeros(rows, self.num_heads, self.head_dim, self.head_dim, dtype=precise, device=device)
        return GatedRetentionState(matrix, torch.zeros(rows, dtype=torch.int64, device=device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        length = x.shape[1]
        assert state is None or isinstance(state, GatedRetentionState)
        valid = ragged.valid(length) if ragged is not None else None
        positions = call_positions(length, ragged, 0 if state is None else state.lengths, x.device)
        q, k, v, gate, decay = self.project(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        precise = torch.promote_types(x.dtype, torch.float32)
        angles = positions[..., None].to(precise) * rotation_frequencies(self.head_dim, 1e4, True, x.device, precise)
        q, k = rotate(q, angles), rotate(k, angles) * self.head_dim**-0.5
        log_decay = nn.functional.logsigmoid(decay.to(precise)).transpose(1, 2) / self.temperature  # [B, H, L]
        k, log_decay = zero_padding(k, valid, 2), zero_padding(log_decay, valid, 2)  # padding leaves the State alone
        matrix = None if state is None else state.matrix
        starts = ragged.starts if ragged is not None else None
        retained, final = decayed_scan(q, k, v, log_decay, matrix, starts, self.chunk_size, state is not None)
        retained = nn.functional.rms_norm(retained, (self.head_dim,), eps=self.epsilon).transpose(1, 2).flatten(2)
        y: Tensor = self.out(nn.functional.silu(gate) * retained)
        if state is None:
            return y, None
        assert final is not None
        added = length if ragged is None or ragged.lengths is None else ragged.lengths
        return y, GatedRetentionState(updated(state.matrix, final), updated(state.lengths, state.lengths + added))

    def count_parameters(self) -> int:
        """5 d h E + d h."""
        return self.d_model * (sum(self.widths) + self.num_heads * self.head_dim)

    def flops(self, length: int, context: int = 0) -> int:
        """Projections and the scan."""
        size = self.num_heads, self.head_dim
        return 2 * length * self.count_parameters() + decayed_scan_flops(length, context, size, size, self.chunk_size)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """h E^2 elements whatever the length."""
        return self.num_heads * self.head_dim**2 * torch.promote_types(dtype, torch.float32).itemsize
