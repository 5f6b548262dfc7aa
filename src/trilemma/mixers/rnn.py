"""The simple recurrent network (Elman 1990, "Finding structure in time"), torch's kernel.

    h_t = act(W_x x_t + W_h h_{t-1} + b)

act is tanh or relu.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.recurrent import init_kernel, run_kernel
from trilemma.ragged import Ragged
from trilemma.registry import register_mixer
from trilemma.state import State, updated


@dataclass
class RNNState(State):
    """h: [rows, hidden], float32 at least."""

    h: Tensor


@register_mixer("rnn")
class RNN(Mixer):
    """An Elman layer: a recurrence without gates.

    Args:
        d_model: width of input and output.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        hidden: cells; None: d_model. Another number adds an output projection.
        activation: tanh, or relu, which nothing bounds: what it remembers may grow without end.
    """

    capabilities = Capabilities(
        constant_state=True, compiles="torch's recurrent kernel is opaque to the compiler; it runs as it is"
    )

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        hidden: int | None = None,
        activation: Literal["tanh", "relu"] = "tanh",
    ) -> None:
        super().__init__(d_model, causal)
        if activation not in ("tanh", "relu"):
            raise ConfigError(f'rnn: unknown activation "{activation}"')
        self.hidden = hidden or d_model
        self.kernel = nn.RNN(d_model, self.hidden, nonlinearity=activation, batch_first=True)
        self.out = nn.Linear(self.hidden, d_model) if self.hidden != d_model else None
        init_kernel(self.kernel, gates=1)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """As wide as the model, and with an output projection. relu stays out: with the laws' random weights nothing
        keeps it from exploding over a thousand tokens; its tests are short."""
        return [{}, {"hidden": 12}]

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> RNNState:
        """Zeros."""
        precise = torch.promote_types(dtype, torch.float32)
        return RNNState(torch.zeros(rows, self.hidden, dtype=precise, device=device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, RNNState)
        y, last = run_kernel(self.kernel, x, None if state is None else (state.h,), ragged)
        if self.out is not None:
            y = self.out(y)
        if state is None:
            return y, None
        return y, RNNState(updated(state.h, last[0].to(state.h.dtype)))

    def count_parameters(self) -> int:
        """w (d + w + 2), and the output projection."""
        count = self.hidden * (self.d_model + self.hidden + 2)
        return count + (self.d_model * (self.hidden + 1) if self.out is not None else 0)

    def flops(self, length: int, context: int = 0) -> int:
        """2 w (d + w) a token, and the output projection."""
        per_token = 2 * self.hidden * (self.d_model + self.hidden)
        return length * (per_token + (2 * self.hidden * self.d_model if self.out is not None else 0))

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """w elements."""
        return self.hidden * torch.promote_types(dtype, torch.float32).itemsize
