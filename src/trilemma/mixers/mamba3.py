"""Mamba-3 (Lahoti et al. 2026, arXiv 2603.15569), SISO and MIMO.

    z, x, B, C, Delta', A', lambda', w = u W_in      Delta = softplus(Delta' + b), A = -f(A'), lambda = sigmoid(lambda')
    B, C = rotate(RMSNorm(.) + bias, theta_t)        theta_t = theta_{t-1} + Delta_t pi tanh(w_t)
    S_t = e^(Delta_t A_t) (S_{t-1} + (1 - lambda_t) Delta_t B_{t-1} x_{t-1}^T) + lambda_t Delta_t B_t x_t^T
    y = ((S_t^T C_t + D x_t) * SiLU(z)) W_out        f(a) = 1 + a for a >= 0, else 1 / (1 - a)

The update is the trapezoidal rule, the rotation a state transition with complex eigenvalues. MIMO writes and reads R
pairs at once: x_r = x * M^x_r, y = sum_r M^o_r * (S^T C_r + D x_r) * SiLU(z * M^z_r).

In the chunkwise form a token is written once, with its own weight and that which the next token gives it, lambda_t
Delta_t + (1 - lambda_{t+1}) Delta_{t+1}, of which its own output sees the first part.

Legend: rows, L length, H heads, P head_dim, G groups, E d_state, R mimo_rank, I = H P the inner width.
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
from trilemma.nn.convolution import extended, next_tail
from trilemma.nn.positions import rotate
from trilemma.nn.time_step import time_step_bias
from trilemma.ops.trapezoidal_scan import TRAPEZOIDAL_SCAN, trapezoidal_scan, trapezoidal_scan_flops
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class Mamba3State(State):
    """What Mamba-3 remembers.

    Attributes:
        matrix: [rows, H, E, P], float32 at least.
        angle: [rows, H, angles] theta in [0, 2 pi), float32 at least.
        key: [rows, 1, R H E] the last token's B, rotated.
        value: [rows, 1, I] the last token's x.
    """

    matrix: Tensor
    angle: Tensor
    key: Tensor
    value: Tensor


@register_mixer("mamba3")
class Mamba3(Mixer):
    """A Mamba-3 layer: trapezoidal update, data-dependent rotation, biases in place of a short convolution.

    Like Mamba-2 it brings its own gate; the number of heads is expand * d_model / head_dim, and the model's num_heads
    has no say. Features are rotated in neighbouring pairs; the authors' MIMO kernels pair i with i + E / 2, which is
    the same model with d_state permuted.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        d_state: E, rows of a head's state.
        head_dim: P; None: 64, or the largest divisor of 64 that divides the inner width.
        expand: I / d_model.
        num_groups: G, sets of B and C; a multiple of it are the heads.
        mimo_rank: R; 1 is SISO, the authors' MIMO has 4.
        rope_fraction: of the d_state features, how many are rotated.
        chunk_size: of the chunkwise form, in tokens; changes speed, never the answer. None: 64 / R.
        epsilon: of the norms of B and C.
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
        mimo_rank: int = 1,
        rope_fraction: float = 0.5,
        chunk_size: int | None = None,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        self.inner = expand * d_model
        self.head_dim = head_dim or math.gcd(64, self.inner)
        self.num_heads, rest = divmod(self.inner, self.head_dim)
        if rest or self.num_heads % num_groups:
            raise ConfigError(
                f"mamba3: expand * d_model = {self.inner} must be a multiple of head_dim * num_groups = "
                f"{self.head_dim} * {num_groups}"
            )
        self.angles = int(d_state * rope_fraction) // 2
        if d_state % 2 or not 1 <= self.angles <= d_state // 2:
            raise ConfigError(f"mamba3: rope_fraction {rope_fraction} of d_state {d_state} makes no pairs to rotate")
        self.d_state, self.num_groups, self.mimo_rank = d_state, num_groups, mimo_rank
        self.chunk_size, self.epsilon = chunk_size or max(64 // mimo_rank, 1), epsilon
        shared, heads = mimo_rank * num_groups * d_state, self.num_heads
        # gate, x, B and C, Delta, A, lambda, angle
        self.widths = [self.inner, self.inner, 2 * shared, heads, heads, heads, self.angles]
        self.project = nn.Linear(d_model, sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(time_step_bias(heads))
        self.bc_norm = nn.Parameter(torch.ones(2, d_state))
        self.bc_bias = nn.Parameter(torch.ones(2, mimo_rank, heads, d_state))
        self.mimo_x = self.mimo_z = self.mimo_o = None
        if mimo_rank > 1:
            ranks = torch.ones(mimo_rank, heads, self.head_dim)
            self.mimo_x, self.mimo_z = nn.Parameter(ranks / mimo_rank), nn.Parameter(ranks.clone())
            self.mimo_o = nn.Parameter(ranks / mimo_rank)
        self.D = nn.Parameter(torch.ones(heads))
        self.out = nn.Linear(self.inner, d_model, bias=False)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """SISO and MIMO, chunks of 64, 7, 1 and longer than any sequence of the laws, groups, full rotation."""
        return [
            {},
            {"d_state": 8, "head_dim": 8, "mimo_rank": 2, "chunk_size": 7},
            {"d_state": 6, "head_dim": 8, "num_groups": 2, "chunk_size": 1, "rope_fraction": 1.0},
            {"d_state": 4, "head_dim": 4, "num_groups": 4, "mimo_rank": 4, "expand": 1},
            {"d_state": 8, "head_dim": 16, "mimo_rank": 3, "chunk_size": 1000},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The trapezoidal scan."""
        return (TRAPEZOIDAL_SCAN,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> Mamba3State:
        """Zeros."""
        precise = torch.promote_types(dtype, torch.float32)
        heads, keys = self.num_heads, self.mimo_rank * self.num_heads * self.d_state
        return Mamba3State(
            matrix=torch.zeros(rows, heads, self.d_state, self.head_dim, dtype=precise, device=device),
            angle=torch.zeros(rows, heads, self.angles, dtype=precise, device=device),
            key=torch.zeros(rows, 1, keys, dtype=dtype, device=device),
            value=torch.zeros(rows, 1, self.inner, dtype=dtype, device=device),
        )

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        length = x.shape[1]
        assert state is None or isinstance(state, Mamba3State)
        gate, u, bc, step, rate, trapezoid, turn = self.project(x).split(self.widths, dim=-1)
        precise = torch.promote_types(x.dtype, torch.float32)
        step = nn.functional.softplus(step.to(precise) + self.dt_bias.to(precise))  # [rows, L, H]
        # A step of 0 at padding leaves the State untouched.
        step = zero_padding(step, ragged.valid(length) if ragged is not None else None)
        log_decay = -decay_rate(rate.to(precise)) * step
        now = torch.sigmoid(trapezoid.to(precise)) * step  # weight of a token, and of the token before
        before = step - now
        theta = (step[..., None] * (math.pi * turn.to(precise).tanh())[:, :, None]).cumsum(1)  # [rows, L, H, angles]
        if state is not None:
            theta = theta + state.angle[:, None]
        k, q = self._rotated(bc, theta)  # [rows, L, R, H, E]
        v = self._ranks(u, self.mimo_x)  # [rows, L, R, H, P]
        starts = ragged.starts if ragged is not None else None
        o, final = trapezoidal_scan(
            _flat(q),
            _flat(k),
            _flat(v),
            log_decay.transpose(1, 2),
            now.transpose(1, 2),
            before.transpose(1, 2),
            None if state is None else state.matrix,
            None if state is None else _flat(state.key.unflatten(-1, (self.mimo_rank, self.num_heads, -1))),
            None if state is None else _flat(self._ranks(state.value, self.mimo_x)),
            starts,
            self.chunk_size,
            state is not None,
            self.mimo_rank,
        )
        o = torch.addcmul(o.transpose(1, 2).unflatten(1, (length, -1)), v, self.D[:, None].to(v.dtype))
        y: Tensor = self.out(self._gated(o, gate))
        if state is None:
            return y, None
        assert final is not None
        return y, Mamba3State(
            matrix=updated(state.matrix, final),
            angle=updated(state.angle, theta[:, -1].remainder(2 * math.pi)),
            key=next_tail(state.key, extended(k.flatten(2), state.key, 2), ragged),
            value=next_tail(state.value, extended(u, state.value, 2), ragged),
        )

    def _rotated(self, bc: Tensor, theta: Tensor) -> Tensor:
        """B and C [rows, L, 2 R G E], normed, biased, rotated by theta [rows, L, H, .] -> [2, rows, L, R, H, E]."""
        parts = bc.unflatten(-1, (2, self.mimo_rank, self.num_groups, 1, -1))
        parts = nn.functional.rms_norm(parts, parts.shape[-1:], eps=self.epsilon)
        parts = parts.permute(2, 3, 0, 1, 4, 5, 6) * self.bc_norm.to(bc.dtype)[:, None, None, None, None, None]
        bias = self.bc_bias.to(bc.dtype).unflatten(2, (self.num_groups, -1))[:, :, None, None]
        biased = parts.contiguous() + bias  # [2, R, rows, L, G, H / G, E]
        turned = rotate(biased.flatten(2, 5).flatten(0, 1)[None], theta.flatten(0, 2)[None])[0]
        return turned.view(2, self.mimo_rank, *theta.shape[:3], self.d_state).permute(0, 2, 3, 1, 4, 5)

    def _ranks(self, part: Tensor, weight: Tensor | None) -> Tensor:
        """[rows, L, I] -> [rows, L, R, H, P], with MIMO a weighted copy for each rank."""
        heads: Tensor = part.unflatten(-1, (1, self.num_heads, -1))
        return heads if weight is None else heads * weight.to(part.dtype)

    def _gated(self, o: Tensor, gate: Tensor) -> Tensor:
        """[rows, L, R, H, P] and the gate [rows, L, I] -> [rows, L, I]."""
        mixed = o * nn.functional.silu(self._ranks(gate, self.mimo_z))
        if self.mimo_o is not None:
            mixed = mixed * self.mimo_o.to(o.dtype)
        return mixed.sum(2).flatten(2)

    def no_weight_decay(self) -> set[str]:
        """Norms and biases, the skip and the step sizes."""
        return {"bc_norm", "bc_bias", "D", "dt_bias"}

    def count_parameters(self) -> int:
        """d (3 I + 2 R G E + 3 H + angles), 2 R H E + 2 E + 2 H, and with MIMO 3 R I."""
        projections = self.d_model * (sum(self.widths) + self.inner)
        biases = 2 * self.d_state * (self.mimo_rank * self.num_heads + 1) + 2 * self.num_heads
        return projections + biases + (3 * self.mimo_rank * self.inner if self.mimo_rank > 1 else 0)

    def flops(self, length: int, context: int = 0) -> int:
        """Projections and the scan."""
        projections = 2 * length * self.d_model * (sum(self.widths) + self.inner)
        size = self.num_heads, self.d_state, self.head_dim
        return projections + trapezoidal_scan_flops(length, context, *size, self.chunk_size, self.mimo_rank)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """I E and the angles; B and x of one token."""
        precise = torch.promote_types(dtype, torch.float32).itemsize
        last = self.mimo_rank * self.num_heads * self.d_state + self.inner
        return (self.inner * self.d_state + self.num_heads * self.angles) * precise + last * dtype.itemsize


def decay_rate(a: Tensor) -> Tensor:
    """f(a) = 1 + a for a >= 0, else 1 / (1 - a): positive with heavy tails; at least 1e-4, as its authors have it."""
    return (a.clamp(min=0) + 1 / (1 - a.clamp(max=0))).clamp(min=1e-4)


def _flat(part: Tensor) -> Tensor:
    """[rows, L, R, H, *] -> [rows, H, L R, *]."""
    return part.flatten(1, 2).transpose(1, 2)
