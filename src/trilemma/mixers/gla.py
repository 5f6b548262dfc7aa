"""Gated linear attention (Yang et al. 2024, arXiv 2312.06635): linear attention whose State decays channel by channel.

Per head, with q_t = W_q x_t / sqrt(E), k_t = W_k x_t, v_t = W_v x_t:

    a_t = sigmoid(W_2 W_1 x_t + b)^(1/16),   S_t = Diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))

W_1 is a bottleneck of 16 channels; the root keeps decays near 1. No positions, no convolution.

Legend: B rows, H heads, L length, E key channels per head, F value channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer, Shared
from trilemma.nn.norms import RMSNorm
from trilemma.ops.truth import TruthPair
from trilemma.ops.vector_decay import VECTOR_SCAN, vector_scan, vector_scan_flops
from trilemma.ragged import Ragged, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class GLAState(State):
    """What gated linear attention remembers.

    Attributes:
        matrix: [B, H, E, F], float32 at least.
    """

    matrix: Tensor


@register_mixer("gla")
class GatedLinearAttention(Mixer):
    """Gated linear attention (Yang et al. 2024, arXiv 2312.06635): a matrix State with a decay for each key channel,
    computed from the token; memory of constant size, training in chunks.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: heads; the paper's is 4.
        expand_k: keys have expand_k * d_model channels in all.
        expand_v: values have expand_v * d_model channels in all.
        gate_rank: width of the decay's bottleneck.
        gate_normalizer: the decay is sigmoid(.)^(1 / gate_normalizer).
        chunk_size: of the chunkwise form, rounded up to a power of two; changes speed, never the answer.
        epsilon: of the norm.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        chunk_size: int = 64,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        keys, values = int(d_model * expand_k), int(d_model * expand_v)
        if keys % num_heads or values % num_heads or min(keys, values) < 1:
            raise ConfigError(f"gla: {keys} key and {values} value channels do not divide into {num_heads} heads")
        self.num_heads, self.key_dim, self.value_dim = num_heads, keys // num_heads, values // num_heads
        self.gate_normalizer, self.chunk_size = gate_normalizer, chunk_size
        self.widths = [keys, keys, values, values, gate_rank]
        self.project = nn.Linear(d_model, sum(self.widths), bias=False)
        self.decay = nn.Linear(gate_rank, keys)
        self.norm = RMSNorm(self.value_dim, epsilon)
        self.out = nn.Linear(values, d_model, bias=False)
        # The published code's initialisation.
        for weight in (*self.project.weight.split(self.widths), self.decay.weight, self.out.weight):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        nn.init.zeros_(self.decay.bias)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Chunks of 1, 7, 64 and longer than any sequence of the laws; keys wider than values; strong decay."""
        return [
            {},
            {"chunk_size": 7, "expand_k": 1.0, "expand_v": 0.5, "gate_rank": 3},
            {"chunk_size": 1, "gate_normalizer": 0.1},
            {"chunk_size": 1000, "gate_normalizer": 0.01},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The scan with a decay for each channel."""
        return (VECTOR_SCAN,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> GLAState:
        """Zeros."""
        shape = (rows, self.num_heads, self.key_dim, self.value_dim)
        return GLAState(torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, GLAState)
        valid = ragged.valid(x.shape[1]) if ragged is not None else None
        starts = ragged.starts if ragged is not None else None
        q, k, v, gate, low = self.project(x).split(self.widths, dim=-1)
        decay = self.decay(low).to(torch.promote_types(x.dtype, torch.float32))
        log_decay = nn.functional.logsigmoid(decay) / self.gate_normalizer
        k, log_decay = zero_padding(k, valid), zero_padding(log_decay, valid)
        q, k, v, log_decay = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q * self.key_dim**-0.5, k, v, log_decay)
        )
        matrix = None if state is None else state.matrix
        read, final = vector_scan(q, k, v, log_decay, matrix, starts, self.chunk_size, state is not None)
        y: Tensor = self.out(self.norm(read.to(x.dtype)).transpose(1, 2).flatten(2) * nn.functional.silu(gate))
        if state is None:
            return y, None
        assert final is not None
        return y, GLAState(updated(state.matrix, final))

    def count_parameters(self) -> int:
        """Projections in and out, the decay's second matrix and bias, the norm."""
        keys, _, values, _, rank = self.widths
        return self.d_model * (sum(self.widths) + values) + (rank + 1) * keys + self.value_dim

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, and the scan in the form that a call of this length runs."""
        keys, _, values, _, rank = self.widths
        projections = 2 * length * (self.d_model * (sum(self.widths) + values) + rank * keys)
        scan = vector_scan_flops(length, self.key_dim, self.value_dim, self.chunk_size, context > 0)
        return projections + self.num_heads * scan

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """H E F elements whatever the length."""
        element = torch.promote_types(dtype, torch.float32).itemsize
        return self.num_heads * self.key_dim * self.value_dim * element
