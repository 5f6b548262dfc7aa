"""Kimi delta attention (Kimi Team 2025, arXiv 2510.26692): the delta rule with a decay for each key channel.

Per head, with q_t, k_t, v_t after a short convolution and SiLU, q and k of norm 1, q scaled by E^(-1/2):

    a_t = exp(-exp(A) softplus(W_2 W_1 x_t + b)),   beta_t = sigmoid(w x_t)
    S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t
    y_t = W_o (RMSNorm(o_t) * sigmoid(W_4 W_3 x_t + c))

A is one number a head; W_1 and W_3 are bottlenecks as wide as a head.

Legend: B rows, H heads, L length, E channels per head, of keys and of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer, Shared
from trilemma.nn.convolution import ShortConvolution
from trilemma.nn.norms import RMSNorm, unit_norm
from trilemma.nn.time_step import time_step_bias
from trilemma.ops.truth import TruthPair
from trilemma.ops.vector_delta import VECTOR_DELTA, vector_delta, vector_delta_flops
from trilemma.ragged import Ragged, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class KDAState(State):
    """What Kimi delta attention remembers.

    Attributes:
        matrix: [B, H, E, E], float32 at least.
        tail: [B, taps - 1, 3 H E] the last inputs of the convolution.
    """

    matrix: Tensor
    tail: Tensor


@register_mixer("kda")
class KimiDeltaAttention(Mixer):
    """Kimi delta attention (Kimi Team 2025, arXiv 2510.26692): a matrix State that each token decays channel by channel
    and corrects at its key; memory of constant size, training in chunks.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: heads.
        head_dim: E; None: d_model / num_heads. The paper's is 128.
        conv_size: taps of the short convolution.
        negative_eigenvalues: beta from 0 to 2 instead of 1, so that a token can turn a direction of the State around,
            which tracking states needs (Grazzi et al. 2025, arXiv 2411.12537).
        chunk_size: of the chunkwise form, rounded up to a power of two; changes speed, never the answer.
        epsilon: of the norm.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        head_dim: int | None = None,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        chunk_size: int = 64,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        if head_dim is None and d_model % num_heads:
            raise ConfigError(f"kda: d_model {d_model} is no multiple of num_heads {num_heads}; give head_dim")
        self.num_heads, self.head_dim = num_heads, head_dim or d_model // num_heads
        self.beta_range = 2.0 if negative_eigenvalues else 1.0
        self.chunk_size = chunk_size
        inner = num_heads * self.head_dim
        self.widths = [3 * inner, self.head_dim, self.head_dim, num_heads]
        self.project = nn.Linear(d_model, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(3 * inner, conv_size)
        self.decay = nn.Linear(self.head_dim, inner, bias=False)
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())  # A
        self.decay_bias = nn.Parameter(time_step_bias(inner))  # b
        self.gate = nn.Linear(self.head_dim, inner)
        self.norm = RMSNorm(self.head_dim, epsilon)
        self.out = nn.Linear(inner, d_model, bias=False)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Chunks of 1, 7, 64 and longer than any sequence of the laws; both ranges of beta; heads of another width."""
        return [
            {},
            {"chunk_size": 7, "negative_eigenvalues": True, "conv_size": 2},
            {"chunk_size": 1, "head_dim": 6},
            {"chunk_size": 1000, "negative_eigenvalues": True},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The delta rule with a decay for each channel."""
        return (VECTOR_DELTA,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> KDAState:
        """Zeros."""
        shape = (rows, self.num_heads, self.head_dim, self.head_dim)
        matrix = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return KDAState(matrix, self.convolution.new_tail(rows, dtype, device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, KDAState)
        valid = ragged.valid(x.shape[1]) if ragged is not None else None
        starts = ragged.starts if ragged is not None else None
        matrix, tail = (None, None) if state is None else (state.matrix, state.tail)
        precise = torch.promote_types(x.dtype, torch.float32)
        qkv, low_decay, low_gate, strength = self.project(x).split(self.widths, dim=-1)
        qkv, tail = self.convolution(qkv, tail, ragged)
        # [B, 3 H, L, E] -> [B, H, L, E] each
        q, k, v = qkv.to(precise).unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2).chunk(3, dim=1)
        q, k = unit_norm(q) * self.head_dim**-0.5, unit_norm(k)
        beta = torch.sigmoid(strength.to(precise)).transpose(1, 2)[..., None] * self.beta_range  # [B, H, L, 1]
        time = nn.functional.softplus(self.decay(low_decay).to(precise) + self.decay_bias.to(precise))
        time = time.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        log_decay = -self.log_rate.to(precise).exp()[:, None, None] * time
        beta, log_decay = zero_padding(beta, valid, 2), zero_padding(log_decay, valid, 2)
        read, final = vector_delta(
            q, beta * k, v, log_decay, k, None, matrix, starts, self.chunk_size, state is not None
        )
        read = self.norm(read.to(x.dtype)).transpose(1, 2).flatten(2)
        y: Tensor = self.out(read * torch.sigmoid(self.gate(low_gate)))
        if state is None:
            return y, None
        assert final is not None
        assert tail is not None
        return y, KDAState(updated(state.matrix, final), tail)

    def count_parameters(self) -> int:
        """Projections in and out, the second matrices of both bottlenecks, filters, biases, rates, the norm."""
        inner = self.num_heads * self.head_dim
        matrices = self.d_model * (sum(self.widths) + inner) + 2 * self.head_dim * inner
        return matrices + self.convolution.count_parameters() + 2 * inner + self.num_heads + self.head_dim

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, the convolution, and the delta rule in the form that a call of this length runs."""
        inner = self.num_heads * self.head_dim
        projections = 2 * length * (self.d_model * (sum(self.widths) + inner) + 2 * self.head_dim * inner)
        rule = vector_delta_flops(length, self.head_dim, self.head_dim, self.chunk_size, context > 0)
        return projections + self.convolution.flops(length) + self.num_heads * rule

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """H E^2 elements and the tail, whatever the length."""
        matrix = self.num_heads * self.head_dim**2 * torch.promote_types(dtype, torch.float32).itemsize
        return matrix + (self.convolution.taps - 1) * 3 * self.num_heads * self.head_dim * dtype.itemsize
