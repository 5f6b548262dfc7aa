"""Mamba, the selective state space model (Gu and Dao 2023, arXiv 2312.00752), its first version.

    u, z     u = silu(conv(W_u x)), z = W_z x
    select   r_t, b_t, c_t = W_s u_t;  dt_t = softplus(W_dt r_t + bias)
    scan     h_t = exp(dt_t A) h_{t-1} + dt_t u_t b_t,  A = -exp(A_log);  one recurrence a channel and state
    y        W_o ((c_t . h_t + D u_t) * silu(z_t))

Legend: B rows, L length, E channels (d_inner), N states a channel, R rank of dt, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.convolution import ShortConvolution
from trilemma.ops.diagonal_scan import DIAGONAL_SCAN
from trilemma.ops.selective_scan import SELECTIVE_SCAN, selective_scan, selective_step
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated

_SHORTEST, _LONGEST = 1e-3, 1e-1  # dt at initialisation


@dataclass
class MambaState(State):
    """What Mamba remembers.

    Attributes:
        tail: [B, K - 1, E] the convolution's last inputs.
        h: [B, N, E], float32 at least.
    """

    tail: Tensor
    h: Tensor


@register_mixer("mamba")
class Mamba(Mixer):
    """Mamba's block: a gated, selective recurrence of N states in each of `expand * d_model` channels.

    It holds its own gate and no feed-forward layer is needed after it: the authors stack two where a Transformer has
    one layer. About 3 expand d^2 weights.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        d_state: N.
        taps: K, of the convolution.
        expand: E = expand * d_model.
        dt_rank: R; None: d_model / 16, rounded up.
        bias: of the first and last projection.
        segment_size: tokens whose states are held at a time; changes speed and memory, never the answer. None: what
            fits into a cache.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        d_state: int = 16,
        taps: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        segment_size: int | None = None,
    ) -> None:
        super().__init__(d_model, causal)
        self.d_state, self.d_inner, self.segment_size = d_state, expand * d_model, segment_size
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        self.project = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv = ShortConvolution(self.d_inner, taps, bias=True)
        self.select = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_project = nn.Linear(self.dt_rank, self.d_inner, bias=False)
        self.out = nn.Linear(self.d_inner, d_model, bias=bias)
        nn.init.uniform_(self.dt_project.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty(self.d_inner).uniform_(math.log(_SHORTEST), math.log(_LONGEST)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().expand(self.d_inner, -1).clone())
        self.D = nn.Parameter(torch.ones(self.d_inner))

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Segments of 1, 7, and longer than any sequence of the laws; sizes other than the paper's."""
        return [
            {},
            {"segment_size": 7, "d_state": 3, "taps": 2, "bias": True},
            {"segment_size": 1, "d_state": 1, "dt_rank": 5},
            {"segment_size": 1000, "d_state": 2, "expand": 1},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The diagonal scan, and the selective scan that stands on it."""
        return (DIAGONAL_SCAN, SELECTIVE_SCAN)

    def no_weight_decay(self) -> set[str]:
        """A_log: decaying it would pull every A towards -1."""
        return {"A_log"}

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> MambaState:
        """Zeros."""
        precise = torch.promote_types(dtype, torch.float32)
        h = torch.zeros(rows, self.d_state, self.d_inner, dtype=precise, device=device)
        return MambaState(self.conv.new_tail(rows, dtype, device), h)

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, MambaState)
        u, z = self.project(x).chunk(2, dim=-1)
        u, tail = self.conv(u, None if state is None else state.tail, ragged)
        r, b, c = self.select(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        precise = torch.promote_types(x.dtype, torch.float32)
        u, b, c = u.to(precise), b.to(precise), c.to(precise)
        dt = nn.functional.softplus(self.dt_project(r).to(precise) + self.dt_bias.to(precise))
        a = -self.A_log.to(precise).exp().t()
        if state is not None and x.shape[1] == 1 and ragged is None:
            mixed, h = selective_step(u, dt, a, b, c, state.h)
        else:
            dt = zero_padding(dt, ragged.valid(x.shape[1]) if ragged is not None else None)
            starts = ragged.starts if ragged is not None else None
            mixed, h = selective_scan(u, dt, a, b, c, None if state is None else state.h, starts, self.segment_size)
        mixed = (mixed + self.D.to(precise) * u).to(z.dtype)
        y: Tensor = self.out(mixed * nn.functional.silu(z))
        if state is None:
            return y, None
        assert tail is not None
        return y, MambaState(tail, updated(state.h, h))

    def count_parameters(self) -> int:
        """E (3 d + 2 R + 3 N + K + 3), and biases."""
        bias = 2 * self.d_inner + self.d_model if self.project.bias is not None else 0
        per_channel = 3 * self.d_model + 2 * self.dt_rank + 3 * self.d_state + self.conv.taps + 3
        return self.d_inner * per_channel + bias

    def flops(self, length: int, context: int = 0) -> int:
        """Projections and the convolution; the scan is element by element."""
        per_token = 2 * self.d_inner * (3 * self.d_model + 2 * self.dt_rank + 2 * self.d_state)
        return length * per_token + self.conv.flops(length)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """E N elements, and K - 1 inputs of the convolution."""
        tail = (self.conv.taps - 1) * dtype.itemsize
        return self.d_inner * (self.d_state * torch.promote_types(dtype, torch.float32).itemsize + tail)
