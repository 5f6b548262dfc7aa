"""Mamba-2 (state-space duality, Dao & Gu 2024, arXiv 2405.21060).

    z, u, Delta' = x W_in;  v, B, C = SiLU(conv(u))         Delta = softplus(Delta' + b), A = -exp(A_log), per head
    S_t = exp(Delta_t A) S_{t-1} + Delta_t B_t v_t^T        o_t = S_t^T C_t + D v_t
    y = RMSNorm_g(o * SiLU(z)) W_out                        the norm after the gate, over the channels of a group

The heads of a group share B (the keys) and C (the queries).

Legend: batch rows, L length, H heads, P head_dim, G groups, E d_state, I = H P the inner width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.convolution import ShortConvolution
from trilemma.nn.time_step import time_step_bias
from trilemma.ops.decayed_scan import DECAYED_SCAN, decayed_scan, decayed_scan_flops
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class Mamba2State(State):
    """What Mamba-2 remembers.

    Attributes:
        matrix: [rows, H, E, P], float32 at least.
        tail: [rows, conv_size - 1, I + 2 G E] the convolution's last inputs.
    """

    matrix: Tensor
    tail: Tensor


@register_mixer("mamba2")
class Mamba2(Mixer):
    """A Mamba-2 layer: a selective state space with one decay a head, computed in chunks by matrix products.

    It brings its own gate and twice the width of the model, so that its authors use two of it in place of an attention
    and a feed-forward layer. The number of heads is expand * d_model / head_dim; the model's num_heads has no say.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        d_state: E, rows of a head's state.
        head_dim: P; None: 64, or the largest divisor of 64 that divides the inner width.
        expand: I / d_model.
        num_groups: G, sets of B and C; a multiple of it are the heads.
        conv_size: taps of the short convolution.
        chunk_size: of the chunkwise form; changes speed, never the answer.
        epsilon: of the norm.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        d_state: int = 128,
        head_dim: int | None = None,
        expand: int = 2,
        num_groups: int = 1,
        conv_size: int = 4,
        chunk_size: int = 64,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        self.inner = expand * d_model
        self.head_dim = head_dim or math.gcd(64, self.inner)
        self.num_heads, rest = divmod(self.inner, self.head_dim)
        if rest or self.num_heads % num_groups:
            raise ConfigError(
                f"mamba2: expand * d_model = {self.inner} must be a multiple of head_dim * num_groups = "
                f"{self.head_dim} * {num_groups}"
            )
        self.d_state, self.num_groups = d_state, num_groups
        self.chunk_size, self.epsilon = chunk_size, epsilon
        shared = num_groups * d_state
        self.widths = [self.inner, self.inner + 2 * shared, self.num_heads]  # gate; v, B, C; Delta
        self.conv_widths = [self.inner, shared, shared]
        self.project = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConvolution(self.widths[1], conv_size, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(time_step_bias(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm_weight = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, d_model, bias=False)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Chunks of 64, 7, 1 and longer than any sequence of the laws; heads in groups; other taps."""
        return [
            {},
            {"d_state": 6, "head_dim": 8, "num_groups": 2, "chunk_size": 7},
            {"d_state": 3, "head_dim": 4, "num_groups": 16, "chunk_size": 1, "conv_size": 2},
            {"d_state": 8, "head_dim": 16, "expand": 1, "chunk_size": 1000, "conv_size": 3},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The decayed scan."""
        return (DECAYED_SCAN,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> Mamba2State:
        """Zeros."""
        precise = torch.promote_types(dtype, torch.float32)
        matrix = torch.zeros(rows, self.num_heads, self.d_state, self.head_dim, dtype=precise, device=device)
        return Mamba2State(matrix, self.conv.new_tail(rows, dtype, device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        length = x.shape[1]
        assert state is None or isinstance(state, Mamba2State)
        gate, inputs, step = self.project(x).split(self.widths, dim=-1)
        inputs, tail = self.conv(inputs, None if state is None else state.tail, ragged)
        v, b, c = inputs.split(self.conv_widths, dim=-1)
        b, c = (part.unflatten(-1, (self.num_groups, -1)).transpose(1, 2) for part in (b, c))  # [rows, G, L, E]
        v = v.unflatten(-1, (self.num_heads, -1))  # [rows, L, H, P]
        precise = torch.promote_types(x.dtype, torch.float32)
        step = nn.functional.softplus(step.to(precise) + self.dt_bias.to(precise))  # [rows, L, H]
        # A step of 0 at padding leaves the State untouched.
        step = zero_padding(step, ragged.valid(length) if ragged is not None else None)
        log_decay = (step * -self.A_log.to(precise).exp()).transpose(1, 2)  # [rows, H, L]
        written = (v * step[..., None].to(v.dtype)).transpose(1, 2)
        matrix = None if state is None else state.matrix
        starts = ragged.starts if ragged is not None else None
        o, final = decayed_scan(c, b, written, log_decay, matrix, starts, self.chunk_size, state is not None)
        o = torch.addcmul(o.transpose(1, 2), v, self.D[:, None].to(v.dtype)).flatten(2)
        y: Tensor = self.out(self._normalised(o * nn.functional.silu(gate)))
        if state is None:
            return y, None
        assert final is not None
        assert tail is not None
        return y, Mamba2State(updated(state.matrix, final), tail)

    def _normalised(self, o: Tensor) -> Tensor:
        """[rows, L, I] -> the same, each group of channels by its root mean square."""
        grouped = o.unflatten(-1, (self.num_groups, -1))
        normed = nn.functional.rms_norm(grouped, grouped.shape[-1:], eps=self.epsilon)
        return normed.flatten(2) * self.norm_weight.to(o.dtype)

    def no_weight_decay(self) -> set[str]:
        """The decay rates, the skip and the step sizes."""
        return {"A_log", "D", "dt_bias"}

    def count_parameters(self) -> int:
        """d (3 I + 2 G E + H), the convolution's (K + 1) (I + 2 G E), I + 3 H."""
        projections = self.d_model * (sum(self.widths) + self.inner)
        return projections + self.conv.count_parameters() + self.inner + 3 * self.num_heads

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, the convolution and the scan."""
        projections = 2 * length * self.d_model * (sum(self.widths) + self.inner)
        keys, values = (self.num_groups, self.d_state), (self.num_heads, self.head_dim)
        scan = decayed_scan_flops(length, context, keys, values, self.chunk_size)
        return projections + self.conv.flops(length) + scan

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """I E elements, and the convolution's tail."""
        matrix = self.inner * self.d_state * torch.promote_types(dtype, torch.float32).itemsize
        return matrix + (self.conv.taps - 1) * self.widths[1] * dtype.itemsize
