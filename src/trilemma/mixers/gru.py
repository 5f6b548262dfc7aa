"""Gated recurrent unit (Cho et al. 2014, arXiv 1406.1078), torch's kernel (reset gate after the product).

    r, z = s(W_x x_t + W_h h_{t-1} + b);  n = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + c_n));  h_t = (1 - z) n + z
    h_{t-1}

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
class GRUState(State):
    """h: [rows, hidden], float32 at least."""

    h: Tensor


@register_mixer("gru")
class GRU(Mixer):
    """A GRU layer.

    Args:
        d_model: width of input and output.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        hidden: cells; None: d_model. Another number adds an output projection.
    """

    capabilities = Capabilities(
        constant_state=True, compiles="torch's recurrent kernel is opaque to the compiler; it runs as it is"
    )

    def __init__(self, d_model: int, causal: bool = True, hidden: int | None = None) -> None:
        super().__init__(d_model, causal)
        self.hidden = hidden or d_model
        self.kernel = nn.GRU(d_model, self.hidden, batch_first=True)
        self.out = nn.Linear(self.hidden, d_model) if self.hidden != d_model else None
        init_kernel(self.kernel, gates=3)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """As wide as the model, and with an output projection."""
        return [{}, {"hidden": 12}]

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> GRUState:
        """Zeros."""
        precise = torch.promote_types(dtype, torch.float32)
        return GRUState(torch.zeros(rows, self.hidden, dtype=precise, device=device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, GRUState)
        y, last = run_kernel(self.kernel, x, None if state is None else (state.h,), ragged)
        if self.out is not None:
            y = self.out(y)
        if state is None:
            return y, None
        return y, GRUState(updated(state.h, last[0].to(state.h.dtype)))

    def count_parameters(self) -> int:
        """3 w (d + w + 2), and the output projection."""
        count = 3 * self.hidden * (self.d_model + self.hidden + 2)
        return count + (self.d_model * (self.hidden + 1) if self.out is not None else 0)

    def flops(self, length: int, context: int = 0) -> int:
        """2 * 3 w (d + w) a token, and the output projection."""
        per_token = 6 * self.hidden * (self.d_model + self.hidden)
        return length * (per_token + (2 * self.hidden * self.d_model if self.out is not None else 0))

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """w elements."""
        return self.hidden * torch.promote_types(dtype, torch.float32).itemsize
