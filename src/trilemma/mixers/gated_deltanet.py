"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule on a State that also decays.

Per head, with q_t, k_t, v_t after a short convolution and SiLU, q and k of norm 1, q scaled by E^(-1/2):

    alpha_t = exp(-exp(A_log) softplus(w_a x_t + dt_bias)),   beta_t = sigmoid(w_b x_t)
    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t
    y_t = W_o (RMSNorm(o_t) * swish(W_g x_t))

Legend: B rows, L length, G heads of queries and keys, H heads of values, E key head dimension, F value head dimension.
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
from trilemma.ops.delta_rule import DELTA_RULE, delta_rule, delta_rule_flops
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class GatedDeltaNetState(State):
    """What Gated DeltaNet remembers.

    Attributes:
        matrix: [B, H, E, F], float32 at least.
        tail: [B, conv_size - 1, 2 G E + H F] the convolution's last inputs.
    """

    matrix: Tensor
    tail: Tensor


@register_mixer("gated_deltanet")
class GatedDeltaNet(Mixer):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a matrix State per head that each token decays by one number
    and corrects at its key; memory of constant size, training in chunks.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: G, heads of queries and keys; the paper's head_dim is 256, so that few heads are usual.
        head_dim: E; None: 3/4 d_model / num_heads, which with expand_v = 2 makes 6 d_model^2 weights.
        expand_v: F = expand_v * E.
        num_value_heads: H, a multiple of num_heads; consecutive value heads share a query and key head. None: G.
        conv_size: taps of the short convolution.
        negative_eigenvalues: beta from 0 to 2 instead of 1, so that a token can turn a direction of the State around,
            which tracking states needs (Grazzi et al. 2025, arXiv 2411.12537). The rule then runs in float32, whatever
            the layer's type, because bfloat16 loses such States.
        chunk_size: of the chunkwise form; changes speed, never the answer. None: 64, with heads wider than 128 128.
        epsilon: of the norm.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand_v: int = 2,
        num_value_heads: int | None = None,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        chunk_size: int | None = None,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        if head_dim is None and 3 * d_model % (4 * num_heads):
            raise ConfigError(
                f"gated_deltanet: 3/4 of d_model {d_model} is no multiple of num_heads {num_heads}; give head_dim"
            )
        self.num_heads, self.num_value_heads = num_heads, num_value_heads or num_heads
        if self.num_value_heads % num_heads:
            raise ConfigError(
                f"gated_deltanet: num_value_heads {num_value_heads} is no multiple of num_heads {num_heads}"
            )
        self.head_dim = head_dim or 3 * d_model // (4 * num_heads)
        self.value_dim = expand_v * self.head_dim
        self.negative_eigenvalues = negative_eigenvalues
        self.chunk_size = chunk_size or (64 if self.head_dim <= 128 else 128)
        keys, values = num_heads * self.head_dim, self.num_value_heads * self.value_dim
        self.widths = [2 * keys + values, values, self.num_value_heads, self.num_value_heads]  # qkv, gate, a, beta
        self.conv_widths = [2 * keys, values]
        self.project = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConvolution(self.widths[0], conv_size)
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads).uniform_(1e-2, 16).log())
        self.dt_bias = nn.Parameter(time_step_bias(self.num_value_heads))
        self.norm = RMSNorm(self.value_dim, epsilon)
        self.out = nn.Linear(values, d_model, bias=False)
        # The published code's initialisation.
        for weight in (*self.project.weight.split([keys, keys, values, *self.widths[1:]]), self.out.weight):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Chunks of 1, 7, 64 and longer than any sequence of the laws; both ranges of beta; shared keys; other taps."""
        return [
            {},
            {"chunk_size": 7, "negative_eigenvalues": True, "num_value_heads": 8, "expand_v": 1},
            {"chunk_size": 1, "head_dim": 5, "expand_v": 3, "conv_size": 2},
            {"chunk_size": 1000, "negative_eigenvalues": True},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The delta rule."""
        return (DELTA_RULE,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> GatedDeltaNetState:
        """Zeros."""
        shape = (rows, self.num_value_heads, self.head_dim, self.value_dim)
        matrix = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return GatedDeltaNetState(matrix, self.conv.new_tail(rows, dtype, device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, GatedDeltaNetState)
        valid = ragged.valid(x.shape[1]) if ragged is not None else None
        starts = ragged.starts if ragged is not None else None
        matrix, tail = (None, None) if state is None else (state.matrix, state.tail)
        precise = torch.promote_types(x.dtype, torch.float32)
        qkv, gate, step, strength = self.project(x).split(self.widths, dim=-1)
        qkv, tail = self.conv(qkv, tail, ragged)
        qk, v = qkv.split(self.conv_widths, dim=-1)
        qk = unit_norm(qk.to(precise).unflatten(-1, (2 * self.num_heads, -1)))
        if self.num_value_heads > self.num_heads:
            qk = qk.repeat_interleave(self.num_value_heads // self.num_heads, dim=2)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)  # [B, H, L, E]
        v = v.unflatten(-1, (self.num_value_heads, -1)).transpose(1, 2)
        beta = torch.sigmoid(strength.to(precise))
        if self.negative_eigenvalues:
            beta, v = 2 * beta, v.to(precise)
        log_decay = nn.functional.softplus(step.to(precise) + self.dt_bias.to(precise)) * -self.A_log.to(precise).exp()
        beta, log_decay = (zero_padding(t, valid).transpose(1, 2) for t in (beta, log_decay))
        q = q * self.head_dim**-0.5
        read, final = delta_rule(q, k, v, beta, log_decay, matrix, starts, self.chunk_size, state is not None)
        read = self.norm(read.transpose(1, 2).to(gate.dtype)).flatten(2)
        y: Tensor = self.out(read * nn.functional.silu(gate))
        if state is None:
            return y, None
        assert final is not None
        assert tail is not None
        return y, GatedDeltaNetState(updated(state.matrix, final), tail)

    def no_weight_decay(self) -> set[str]:
        """The decay rates and the step sizes."""
        return {"A_log", "dt_bias"}

    def count_parameters(self) -> int:
        """d (2 G E + 3 H F + 2 H), the convolution's taps, 2 H + F."""
        projections = self.d_model * (sum(self.widths) + self.widths[1])
        return projections + self.conv.count_parameters() + 2 * self.num_value_heads + self.value_dim

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, the convolution, and the delta rule in the form that a call of this length runs."""
        projections = 2 * length * self.d_model * (sum(self.widths) + self.widths[1])
        rule = delta_rule_flops(length, self.head_dim, self.value_dim, self.chunk_size, context > 0)
        return projections + self.conv.flops(length) + self.num_value_heads * rule

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """H E F elements, and the convolution's tail."""
        matrix = self.num_value_heads * self.head_dim * self.value_dim
        matrix *= torch.promote_types(dtype, torch.float32).itemsize
        return matrix + (self.conv.taps - 1) * self.widths[0] * dtype.itemsize
