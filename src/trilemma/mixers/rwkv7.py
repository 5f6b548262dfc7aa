"""RWKV-7 "Goose" time mixing (Peng et al. 2025, arXiv 2503.14456): a generalised delta rule with vector gates.

Each of r, w, k, v, a, g sees its own blend x_t + m * (x_{t-1} - x_t) of a token with the one before. Per head:

    r_t = W_r x^r_t,  k_t = W_k x^k_t,  v_t = W_v x^v_t,  g_t = V_g sigmoid(U_g x^g_t)
    w_t = exp(-e^(-1/2) sigmoid(w_0 + V_w tanh(U_w x^w_t))),   a_t = sigmoid(a_0 + V_a U_a x^a_t)
    v_t <- v_t + (v'_t - v_t) * sigmoid(v_0 + V_v U_v x^v_t)           in all layers but the first, whose v_t is v'_t
    c_t = k_t * k_k / |k_t * k_k|,   k_t <- k_t * (1 + (a_t - 1) * k_a)
    S_t = (Diag(w_t) - (a_t * c_t) c_t^T) S_{t-1} + k_t v_t^T,   o_t = S_t^T r_t
    y_t = W_o (g_t * (GroupNorm(o_t) + (r_t . (r_k * k_t)) v_t))

The operator erases after the decay: c_t reads S_{t-1} as c_t / w_t reads Diag(w_t) S_{t-1}, and w_t is above 0.545.

Legend: B rows, H heads, L length, E channels per head, D = H E = d_model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer, Published, Shared
from trilemma.nn.convolution import extended, next_tail
from trilemma.ops.truth import TruthPair
from trilemma.ops.vector_delta import VECTOR_DELTA, vector_delta, vector_delta_flops
from trilemma.ragged import Ragged, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated

_FIRST_VALUE = "rwkv7.value"


@dataclass
class RWKV7State(State):
    """What RWKV-7 remembers.

    Attributes:
        matrix: [B, H, E, E], float32 at least.
        last: [B, 1, D] the last token's input.
    """

    matrix: Tensor
    last: Tensor


class LowRank(nn.Module):
    """up(activation(down(x))), the map that the paper calls a LoRA.

    Args:
        width: D.
        scale: the rank is scale * sqrt(D), rounded to a multiple of 32, at least 32.
        activation: between the two matrices.
        bias: [D] initial values, or None for no bias.
    """

    def __init__(self, width: int, scale: float, activation: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        self.rank = max(32, 32 * round(scale * math.sqrt(width) / 32))
        self.down = nn.Linear(width, self.rank, bias=False)
        self.activation = activation
        self.up = nn.Linear(self.rank, width, bias=bias is not None)
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1 * max(1.0, math.sqrt(self.rank / width)))
        if bias is not None:
            with torch.no_grad():
                self.up.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        result: Tensor = self.up(self.activation(self.down(x)))
        return result


@register_mixer("rwkv7")
class RWKV7(Mixer):
    """RWKV-7's time mixing (Peng et al. 2025, arXiv 2503.14456): a matrix State with a decay, a learning rate and a
    removal key for each channel, token shift, and values shared from the first layer; memory of constant size.

    Args:
        d_model: width.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: heads; the authors' have 64 channels.
        producer: True: the first layer of its kind in the stack, whose values all others blend with their own.
        depth: place in the stack from 0 (first layer) to 1 (last), on which the authors' initial blends and decays
            depend; None: 0 for the producer, 0.5 for the others.
        chunk_size: of the chunkwise form, rounded up to a power of two; changes speed, never the answer.
        epsilon: of the group norm.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        num_heads: int = 4,
        producer: bool = True,
        depth: float | None = None,
        chunk_size: int = 64,
        epsilon: float = 64e-5,
    ) -> None:
        super().__init__(d_model, causal)
        if d_model % num_heads:
            raise ConfigError(f"rwkv7: d_model {d_model} is no multiple of num_heads {num_heads}")
        if depth is None:
            depth = 0.0 if producer else 0.5
        self.num_heads, self.head_dim, self.producer = num_heads, d_model // num_heads, producer
        self.chunk_size, self.epsilon = chunk_size, epsilon
        # The authors' initialisation: channels differ by their place in the model and in their head.
        places = torch.arange(d_model)
        linear = places / max(d_model - 1, 1) - 0.5
        zigzag = 2 * (places % self.head_dim) / max(self.head_dim - 1, 1) - 1
        zigzag = zigzag * zigzag.abs()
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]) * (1 - depth)
        self.blend = nn.Parameter(1 - (places / d_model) ** powers[:, None])  # [6, D] of r, w, k, v, a, g
        decay = -5.5 + 6 * (linear + 0.5) ** (1 + depth**0.3) + 2.5 * zigzag
        self.decay = LowRank(d_model, 2.5, nn.Tanh(), decay)
        self.rate = LowRank(d_model, 2.5, nn.Identity(), -0.19 + 0.3 * zigzag + 0.4 * linear)
        self.gate = LowRank(d_model, 5.0, nn.Sigmoid(), None)
        self.value_blend = None if producer else LowRank(d_model, 1.7, nn.Identity(), 0.73 - 0.4 * linear)
        self.removal = nn.Parameter(0.71 - 0.1 * linear)  # k_k
        self.replacement = nn.Parameter(torch.full((d_model,), 1.02))  # k_a
        self.bonus = nn.Parameter(torch.full((num_heads, self.head_dim), -0.04))  # r_k
        self.receptance, self.key, self.value, self.out = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        for layer, scale in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5), (self.out, 0.0)):
            nn.init.uniform_(layer.weight, -scale * d_model**-0.5, scale * d_model**-0.5)
        self.norm_weight = nn.Parameter(torch.ones(d_model))
        self.norm_bias = nn.Parameter(torch.zeros(d_model))

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """First and later layers; chunks of 1, 7, 64 and longer than any sequence of the laws."""
        return [
            {},
            {"producer": False, "chunk_size": 7},
            {"producer": False, "chunk_size": 1, "depth": 1.0},
            {"chunk_size": 1000},
        ]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The delta rule with a decay for each channel."""
        return (VECTOR_DELTA,)

    def publishes(self) -> Mapping[str, Published]:
        """The first layer's values."""
        return {_FIRST_VALUE: (self.d_model,)} if self.producer else {}

    def reads(self) -> Mapping[str, Published]:
        """The first layer's values."""
        return {} if self.producer else {_FIRST_VALUE: (self.d_model,)}

    def no_weight_decay(self) -> set[str]:
        """As the authors do: the four large matrices alone are decayed."""
        large = {f"{name}.weight" for name in ("receptance", "key", "value", "out")}
        return {name for name, _ in self.named_parameters()} - large

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> RWKV7State:
        """Zeros."""
        shape = (rows, self.num_heads, self.head_dim, self.head_dim)
        matrix = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return RWKV7State(matrix, torch.zeros(rows, 1, self.d_model, dtype=dtype, device=device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, RWKV7State)
        valid = ragged.valid(x.shape[1]) if ragged is not None else None
        starts = ragged.starts if ragged is not None else None
        matrix, last = (None, None) if state is None else (state.matrix, state.last)
        line = extended(x, last, 2)
        before = line[:, :-1] if starts is None else line[:, :-1].masked_fill(starts[..., None], 0)
        # what each of the six sees, [B, L, D]
        x_r, x_w, x_k, x_v, x_a, x_g = torch.lerp(x, before, self.blend[:, None, None].to(x.dtype)).unbind(0)
        value = self._shared_value(self.value(x_v), x_v, shared)
        precise = torch.promote_types(x.dtype, torch.float32)
        log_decay = -math.exp(-0.5) * torch.sigmoid(self.decay(x_w).to(precise))
        rate = torch.sigmoid(self.rate(x_a).to(precise))
        key = self.key(x_k).to(precise)
        removal, replacement = self.removal.to(precise), self.replacement.to(precise)
        replaced = key * torch.addcmul(torch.ones_like(rate), rate - 1, replacement)
        parts = (self.receptance(x_r).to(precise), replaced, value.to(precise), key * removal, rate, log_decay)
        r, k, v, c, rate, log_decay = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in parts)
        c = nn.functional.normalize(c, dim=-1)
        read_at = c * (-log_decay).exp()
        written, erased, kept = (zero_padding(t, valid, 2) for t in (k, rate * c, log_decay))
        read, final = vector_delta(
            r, written, v, kept, read_at, erased, matrix, starts, self.chunk_size, state is not None
        )
        read = nn.functional.layer_norm(read, (self.head_dim,), eps=self.epsilon).transpose(1, 2).flatten(2)
        read = torch.addcmul(self.norm_bias.to(precise), read, self.norm_weight.to(precise))
        bonus = (r * k * self.bonus.to(precise)[:, None]).sum(-1, keepdim=True) * v
        y: Tensor = self.out((read + bonus.transpose(1, 2).flatten(2)).to(value.dtype) * self.gate(x_g))
        if state is None:
            return y, None
        assert final is not None
        return y, RWKV7State(updated(state.matrix, final), next_tail(state.last, line, ragged))

    def _shared_value(self, value: Tensor, x_v: Tensor, shared: Shared | None) -> Tensor:
        """The first layer hands its values on, the others blend theirs with them."""
        assert shared is not None
        if self.value_blend is None:
            shared[_FIRST_VALUE] = value
            return value
        return torch.lerp(value, shared[_FIRST_VALUE].to(value.dtype), torch.sigmoid(self.value_blend(x_v)))

    def _low_rank(self) -> list[LowRank]:
        maps = (self.decay, self.rate, self.gate, self.value_blend)
        return [low_rank for low_rank in maps if low_rank is not None]

    def count_parameters(self) -> int:
        """Four large matrices, six blends, the low-rank maps with their biases (but the gate's), and five vectors."""
        maps = self._low_rank()
        return self.d_model * (4 * self.d_model + 6 + 2 * sum(m.rank for m in maps) + len(maps) - 1 + 5)

    def flops(self, length: int, context: int = 0) -> int:
        """Projections and low-rank maps, and the delta rule in the form that a call of this length runs."""
        ranks = sum(low_rank.rank for low_rank in self._low_rank())
        projections = 2 * length * self.d_model * (4 * self.d_model + 2 * ranks)
        rule = vector_delta_flops(length, self.head_dim, self.head_dim, self.chunk_size, context > 0, merged=False)
        return projections + self.num_heads * rule

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """H E^2 elements and one input, whatever the length."""
        matrix = self.num_heads * self.head_dim**2 * torch.promote_types(dtype, torch.float32).itemsize
        return matrix + self.d_model * dtype.itemsize
