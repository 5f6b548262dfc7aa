"""Long short-term memory (Hochreiter & Schmidhuber 1997, with forget gates of Gers et al. 2000), torch's kernel.

    i, f, g, o = split(W_x x_t + W_h h_{t-1} + b);  c_t = s(f) c_{t-1} + s(i) tanh(g);  h_t = s(o) tanh(c_t)

s is the logistic function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.recurrent import init_kernel, run_kernel
from trilemma.ragged import Ragged
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class LSTMState(State):
    """h and c: [rows, hidden], float32 at least."""

    h: Tensor
    c: Tensor


@register_mixer("lstm")
class LSTM(Mixer):
    """An LSTM layer.

    Args:
        d_model: width of input and output.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        hidden: cells; None: d_model. Another number adds an output projection.
        forget_bias: initial bias of the forget gate.
    """

    capabilities = Capabilities(
        constant_state=True, compiles="torch's recurrent kernel is opaque to the compiler; it runs as it is"
    )

    def __init__(self, d_model: int, causal: bool = True, hidden: int | None = None, forget_bias: float = 1.0) -> None:
        super().__init__(d_model, causal)
        self.hidden = hidden or d_model
        self.kernel = nn.LSTM(d_model, self.hidden, batch_first=True)
        self.out = nn.Linear(self.hidden, d_model) if self.hidden != d_model else None
        init_kernel(self.kernel, gates=4, forget_bias=forget_bias)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """As wide as the model, and with an output projection."""
        return [{}, {"hidden": 12}]

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> LSTMState:
        """Zeros."""
        precise = torch.promote_types(dtype, torch.float32)
        h = torch.zeros(rows, self.hidden, dtype=precise, device=device)
        return LSTMState(h, torch.zeros_like(h))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, LSTMState)
        y, last = run_kernel(self.kernel, x, None if state is None else (state.h, state.c), ragged)
        if self.out is not None:
            y = self.out(y)
        if state is None:
            return y, None
        h, c = (tensor.to(state.h.dtype) for tensor in last)
        return y, LSTMState(updated(state.h, h), updated(state.c, c))

    def count_parameters(self) -> int:
        """4 w (d + w + 2), and the output projection."""
        count = 4 * self.hidden * (self.d_model + self.hidden + 2)
        return count + (self.d_model * (self.hidden + 1) if self.out is not None else 0)

    def flops(self, length: int, context: int = 0) -> int:
        """2 * 4 w (d + w) a token, and the output projection."""
        per_token = 8 * self.hidden * (self.d_model + self.hidden)
        return length * (per_token + (2 * self.hidden * self.d_model if self.out is not None else 0))

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """2 w elements."""
        return 2 * self.hidden * torch.promote_types(dtype, torch.float32).itemsize
