"""DeltaNet (Schlag et al. 2021; Yang et al. 2024, arXiv 2406.06484): linear attention that corrects what it recalls.

Per head, with q_t, k_t, v_t after a short convolution and SiLU, q and k of norm 1, q scaled by E^(-1/2):

    beta_t = sigmoid(w_b x_t)
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t
    y_t = W_o RMSNorm(o_t)

Legend: B rows, L length, H heads, E channels per head, of keys and of values.
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
from trilemma.ops.delta_rule import DELTA_RULE, delta_rule, delta_rule_flops
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class DeltaNetState(State):
    """What DeltaNet remembers.

    Attributes:
        matrix: [B, H, E, E], float32 at least.
        tail: [B, conv_size - 1, 3 H E] the convolution's last inputs.
    """

    matrix: Tensor
    tail: Tensor


@register_mixer("deltanet")
class DeltaNet(Mixer):
    """DeltaNet (Yang et al. 2024, arXiv 2406.06484): a matrix State per head that each token corrects at its key, with
    no decay and no gate; memory of constant size, training in chunks.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: H.
        head_dim: E; None: d_model / num_heads. The paper's is 128.
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
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        chunk_size: int | None = None,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        if head_dim is None and d_model % num_heads:
            raise ConfigError(f"deltanet: d_model {d_model} is no multiple of num_heads {num_heads}; give head_dim")
        self.num_heads, self.head_dim = num_heads, head_dim or d_model // num_heads
        self.negative_eigenvalues = negative_eigenvalues
        self.chunk_size = chunk_size or (64 if self.head_dim <= 128 else 128)
        inner = num_heads * self.head_dim
        self.widths = [3 * inner, num_heads]  # qkv, beta
        self.project = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConvolution(3 * inner, conv_size)
        self.norm = RMSNorm(self.head_dim, epsilon)
        self.out = nn.Linear(inner, d_model, bias=False)
        # The published code's initialisation.
        for weight in (*self.project.weight.split([inner, inner, inner, num_heads]), self.out.weight):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Chunks of 1, 7, 64 and longer than any sequence of the laws; both ranges of beta; other taps."""
        return [
            {},
            {"chunk_size": 7, "negative_eigenvalues": True, "conv_size": 2},
            {"chunk_size": 1, "head_dim": 5},
            {"chunk_size": 1000, "negative_eigenvalues": True},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The delta rule."""
        return (DELTA_RULE,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> DeltaNetState:
        """Zeros."""
        shape = (rows, self.num_heads, self.head_dim, self.head_dim)
        matrix = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return DeltaNetState(matrix, self.conv.new_tail(rows, dtype, device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, DeltaNetState)
        valid = ragged.valid(x.shape[1]) if ragged is not None else None
        starts = ragged.starts if ragged is not None else None
        matrix, tail = (None, None) if state is None else (state.matrix, state.tail)
        precise = torch.promote_types(x.dtype, torch.float32)
        qkv, strength = self.project(x).split(self.widths, dim=-1)
        qkv, tail = self.conv(qkv, tail, ragged)
        q, k, v = qkv.unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2).chunk(3, dim=1)  # [B, H, L, E]
        q, k = unit_norm(q.to(precise)) * self.head_dim**-0.5, unit_norm(k.to(precise))
        beta = zero_padding(torch.sigmoid(strength.to(precise)), valid).transpose(1, 2)
        if self.negative_eigenvalues:
            beta, v = 2 * beta, v.to(precise)
        read, final = delta_rule(q, k, v, beta, None, matrix, starts, self.chunk_size, state is not None)
        y: Tensor = self.out(self.norm(read.transpose(1, 2).to(qkv.dtype)).flatten(2))
        if state is None:
            return y, None
        assert final is not None
        assert tail is not None
        return y, DeltaNetState(updated(state.matrix, final), tail)

    def count_parameters(self) -> int:
        """4 d H E + d H, the convolution's taps, E."""
        inner = self.num_heads * self.head_dim
        return self.d_model * (sum(self.widths) + inner) + self.conv.count_parameters() + self.head_dim

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, the convolution, and the delta rule in the form that a call of this length runs."""
        inner = self.num_heads * self.head_dim
        projections = 2 * length * self.d_model * (sum(self.widths) + inner)
        rule = delta_rule_flops(length, self.head_dim, self.head_dim, self.chunk_size, context > 0)
        return projections + self.conv.flops(length) + self.num_heads * rule

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """H E^2 elements, and the convolution's tail."""
        matrix = self.num_heads * self.head_dim**2 * torch.promote_types(dtype, torch.float32).itemsize
        return matrix + (self.conv.taps - 1) * self.widths[0] * dtype.itemsize
