"""The mLSTM block of xLSTM (Beck et al. 2024, arXiv 2405.04517, figure 11): a matrix memory with exponential gates.

    u, z         u = W_u x, z = W_z x;  c = silu(conv(u))
    q, k, v      Q c, K c / sqrt(E), V u                        Q, K, V block-diagonal
    gates        log i = w_i [q, k, v] + b_i,  log f = log s(w_f [q, k, v] + b_f), per head
    memory       S_t = f_t S_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t
    read         h_t = S_t^T q_t / max(|n_t^T q_t|, 1)
    y            W_o ((norm(h) + skip * c) * silu(z))           the norm per head

s is the logistic function. The memory is held divided by exp(m), see ops/exponential_scan.py. This is the block of the
first paper; xLSTM-7B's (arXiv 2503.13427) has neither convolution nor block-diagonal maps, and caps its gates.

Legend: B rows, L length, H heads, D inner channels, E head dimension (D / H), K taps.
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
from trilemma.nn.block_diagonal import BlockDiagonal
from trilemma.nn.convolution import ShortConvolution
from trilemma.ops.exponential_scan import EXPONENTIAL_SCAN, exponential_scan
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class MLSTMState(State):
    """What the mLSTM remembers.

    Attributes:
        tail: [B, K - 1, D] the convolution's last inputs.
        matrix: [B, H, E, E + 1], float32 at least: S / exp(m), and n / exp(m) as its last column.
        m: [B, H] running maximum of the gates' logarithms, float32 at least.
    """

    tail: Tensor
    matrix: Tensor
    m: Tensor


@register_mixer("mlstm")
class MLSTM(Mixer):
    """xLSTM's mLSTM block, with its own up-projection and gate: no feed-forward layer is needed after it.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: H.
        expand: D = expand * d_model.
        taps: K, of the convolution.
        block_size: channels of one block of Q, K and V.
        chunk_size: of the chunkwise form; changes speed, never the answer.
        bias: of all linear maps but the gates', which always have one.
        epsilon: of the norm.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        expand: int = 2,
        taps: int = 4,
        block_size: int = 4,
        chunk_size: int = 64,
        bias: bool = False,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        self.inner = expand * d_model
        if self.inner % num_heads or self.inner % block_size:
            sizes = f"num_heads {num_heads} and block_size {block_size}"
            raise ConfigError(f"mlstm: {expand} * d_model = {self.inner} is no multiple of {sizes}")
        self.num_heads, self.head_dim = num_heads, self.inner // num_heads
        self.chunk_size, self.epsilon = chunk_size, epsilon
        std = math.sqrt(2 / (5 * d_model))
        self.project = nn.Linear(d_model, 2 * self.inner, bias=bias)
        self.conv = ShortConvolution(self.inner, taps, bias=True)
        self.q, self.k, self.v = (BlockDiagonal(self.inner, self.inner // block_size, bias, std) for _ in range(3))
        self.gates = nn.Linear(3 * self.inner, 2 * num_heads)
        self.norm_weight = nn.Parameter(torch.ones(self.inner))
        self.skip = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, d_model, bias=bias)
        # The published code's initialisation; its last projection is scaled by depth, which a mixer cannot know.
        for layer in (self.project, self.out):
            nn.init.normal_(layer.weight, std=std)
            if bias:
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            self.gates.bias[:num_heads].normal_(std=0.1)
            self.gates.bias[num_heads:] = torch.linspace(3, 6, num_heads)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Chunks of 1, 7, 64 and longer than any sequence of the laws; sizes other than the paper's."""
        return [
            {},
            {"chunk_size": 7, "bias": True, "taps": 2},
            {"chunk_size": 1, "block_size": 8},
            {"chunk_size": 1000, "expand": 1},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The exponential scan."""
        return (EXPONENTIAL_SCAN,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> MLSTMState:
        """Zeros."""
        precise = torch.promote_types(dtype, torch.float32)
        matrix = torch.zeros(rows, self.num_heads, self.head_dim, self.head_dim + 1, dtype=precise, device=device)
        return MLSTMState(self.conv.new_tail(rows, dtype, device), matrix, matrix.new_zeros(rows, self.num_heads))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, MLSTMState)
        u, z = self.project(x).chunk(2, dim=-1)
        c, tail = self.conv(u, None if state is None else state.tail, ragged)
        q, k, v = self.q(c), self.k(c), self.v(u)
        gates = self.gates(torch.cat([q, k, v], dim=-1)).transpose(1, 2)
        log_input, forget = gates.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=1)
        log_forget = nn.functional.logsigmoid(forget)
        valid = ragged.valid(x.shape[1]) if ragged is not None else None
        if valid is not None:  # padding enters with the weight 0 and forgets nothing
            log_input = log_input.masked_fill(~valid[:, None], -torch.inf)
            log_forget = log_forget.masked_fill(~valid[:, None], 0)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        starts = ragged.starts if ragged is not None else None
        memory = None if state is None else (state.matrix, state.m)
        # In float32 at least: the norm below magnifies what rounding does to small sums.
        q, k, v = (part.to(log_input.dtype) for part in (q, k * self.head_dim**-0.5, v))
        h, after = exponential_scan(q, k, v, log_input, log_forget, memory, starts, self.chunk_size, state is not None)
        h = nn.functional.layer_norm(h, (self.head_dim,), eps=self.epsilon).to(z.dtype).transpose(1, 2).flatten(2)
        y: Tensor = self.out((h * self.norm_weight.to(h.dtype) + self.skip.to(c.dtype) * c) * nn.functional.silu(z))
        if state is None:
            return y, None
        assert after is not None and tail is not None
        return y, MLSTMState(tail, updated(state.matrix, after[0]), updated(state.m, after[1]))

    def count_parameters(self) -> int:
        """D (3 d + 3 block + K + 3 + 6 H) + 2 H, and biases."""
        blocks = self.q.count_parameters() + self.k.count_parameters() + self.v.count_parameters()
        gates = 2 * self.num_heads * (3 * self.inner + 1)
        bias = 2 * self.inner + self.d_model if self.project.bias is not None else 0
        return self.inner * (3 * self.d_model + self.conv.taps + 3) + blocks + gates + bias

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, and the form that a call of this length runs: chunkwise as executed, or one step."""
        per_token = 6 * self.inner * (self.d_model + 2 * self.num_heads)
        blocks = self.q.flops(length) + self.k.flops(length) + self.v.flops(length)
        outside = length * per_token + blocks + self.conv.flops(length)
        per_state = 2 * self.head_dim * (self.head_dim + 1)
        if length == 1:
            return outside + self.num_heads * per_state
        size = min(self.chunk_size, length)
        chunks = -(-length // size)
        within = 2 * size * size * (2 * self.head_dim + 1)
        between = 2 * size * per_state if chunks > 1 or context > 0 else 0
        return outside + self.num_heads * chunks * (within + between)

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """H (E (E + 1) + 1) elements, and K - 1 inputs of the convolution."""
        element = torch.promote_types(dtype, torch.float32).itemsize
        memory = self.num_heads * (self.head_dim * (self.head_dim + 1) + 1)
        return memory * element + (self.conv.taps - 1) * self.inner * dtype.itemsize
