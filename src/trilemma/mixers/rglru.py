"""The recurrent block of Griffin with its real-gated linear recurrent unit (De et al. 2024, arXiv 2402.19427).

    u        u = conv(W_u x)
    gates    r = s(R u), i = s(I u)                      s the logistic function; R, I block-diagonal
    scan     h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t,  log a_t = -8 softplus(Lambda) r_t
    y        W_o (h * gelu(W_g x))

A sequence's first token enters as it is, h_0 = i_0 u_0: the published code, not the paper, has this exception.

Legend: B rows, L length, D channels (width), K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.block_diagonal import BlockDiagonal
from trilemma.nn.convolution import ShortConvolution
from trilemma.ops.diagonal_scan import DIAGONAL_SCAN, diagonal_scan
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, call_positions, zero_padding
from trilemma.registry import register_mixer
from trilemma.state import State, updated

_SHARPNESS = 8.0  # c in the paper
_LEAST, _MOST = 0.9, 0.999  # exp(-softplus(Lambda)) at initialisation


@dataclass
class RGLRUState(State):
    """What the recurrent block remembers.

    Attributes:
        tail: [B, K - 1, D] the convolution's last inputs.
        h: [B, D], float32 at least.
        lengths: [B] tokens read: the first one is treated differently.
    """

    tail: Tensor
    h: Tensor
    lengths: Tensor


@register_mixer("rglru")
class RGLRU(Mixer):
    """Griffin's recurrent block: a gated linear recurrence of one number a channel, which no token can mix.

    The authors alternate two such blocks with one of local attention (`{name: attention, window: 2048}`).

    Args:
        d_model: width of input and output.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        num_heads: blocks of the gates' matrices.
        width: D; None: d_model. The authors' is about 4/3 d_model, a multiple of num_heads.
        taps: K, of the convolution.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self, d_model: int, causal: bool = True, num_heads: int = 8, width: int | None = None, taps: int = 4
    ) -> None:
        super().__init__(d_model, causal)
        self.width = width or d_model
        self.project = nn.Linear(d_model, 2 * self.width)
        self.conv = ShortConvolution(self.width, taps, bias=True, activation=False)
        std = (self.width // num_heads) ** -0.5
        self.recurrence_gate = BlockDiagonal(self.width, num_heads, bias=True, std=std)
        self.input_gate = BlockDiagonal(self.width, num_heads, bias=True, std=std)
        self.out = nn.Linear(self.width, d_model)
        # The published code's initialisation, but for the last projection's factor of depth, which a mixer cannot know.
        nn.init.normal_(self.project.weight, std=d_model**-0.5)
        nn.init.normal_(self.out.weight, std=self.width**-0.5)
        nn.init.normal_(self.conv.weight, std=(0.01 / taps) ** 0.5)
        for layer in (self.project, self.out):
            nn.init.zeros_(layer.bias)
        log_radius = 0.5 * torch.empty(self.width).uniform_(_LEAST**2, _MOST**2).log()
        self.radius = nn.Parameter(torch.expm1(-log_radius).log())  # Lambda: softplus(Lambda) = -log_radius

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """As wide as the model; wider, with fewer taps."""
        return [{}, {"width": 40, "taps": 2}]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The diagonal scan."""
        return (DIAGONAL_SCAN,)

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> RGLRUState:
        """Zeros."""
        h = torch.zeros(rows, self.width, dtype=torch.promote_types(dtype, torch.float32), device=device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        return RGLRUState(self.conv.new_tail(rows, dtype, device), h, lengths)

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, RGLRUState)
        length = x.shape[1]
        u, gate = self.project(x).chunk(2, dim=-1)
        u, tail = self.conv(u, None if state is None else state.tail, ragged)
        first = call_positions(length, ragged, 0 if state is None else state.lengths, x.device)[..., None] == 0
        a, b = self._recurrence(u, first, torch.promote_types(x.dtype, torch.float32))
        valid = ragged.valid(length) if ragged is not None else None
        if valid is not None:  # padding leaves the State untouched
            a, b = a.masked_fill(~valid[..., None], 1), zero_padding(b, valid)
        if state is not None and length == 1:
            h = a * state.h[:, None] + b
        else:
            h = diagonal_scan(a, b, None if state is None else state.h.to(b.dtype))
        y: Tensor = self.out(h.to(gate.dtype) * nn.functional.gelu(gate, approximate="tanh"))
        if state is None:
            return y, None
        assert tail is not None
        added = length if ragged is None or ragged.lengths is None else ragged.lengths
        lengths = updated(state.lengths, state.lengths + added)
        return y, RGLRUState(tail, updated(state.h, h[:, -1]), lengths)

    def _recurrence(self, u: Tensor, first: Tensor, precise: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decay and what is added, [B, L, D] each; `first` [B or 1, L, 1] marks first tokens of sequences."""
        r, i = torch.sigmoid(self.recurrence_gate(u).to(precise)), torch.sigmoid(self.input_gate(u).to(precise))
        log_a = -_SHARPNESS * nn.functional.softplus(self.radius.to(precise)) * r
        # Taken from log a, 1 - a^2 cancels nowhere, and its root's slope is finite but where a rounds to exactly 1.
        room = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(precise).tiny).sqrt()
        return log_a.exp().masked_fill(first, 0), room.masked_fill(first, 1) * i * u.to(precise)

    def count_parameters(self) -> int:
        """3 d D + D (2 D / heads + K + 6) + d."""
        return 3 * self.d_model * self.width + self.d_model + self._gate_weights() + self.width * (self.conv.taps + 6)

    def flops(self, length: int, context: int = 0) -> int:
        """Projections, gates and the convolution; the scan is element by element."""
        return 2 * length * (3 * self.d_model * self.width + self._gate_weights()) + self.conv.flops(length)

    def _gate_weights(self) -> int:
        return self.recurrence_gate.weight.numel() + self.input_gate.weight.numel()

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """D elements, and K - 1 inputs of the convolution."""
        tail = (self.conv.taps - 1) * dtype.itemsize
        return self.width * (torch.promote_types(dtype, torch.float32).itemsize + tail)
