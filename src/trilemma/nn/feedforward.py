"""The position-wise feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from trilemma.ragged import Ragged
from trilemma.state import NoState, State

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu-tanh": "gelu-tanh"}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu-tanh": partial(nn.functional.gelu, approximate="tanh"),
    "silu": nn.functional.silu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function of an activation; of a gated one, that of its gate."""
    return _FUNCTIONS[GATED.get(name, name)]


class FeedForward(nn.Module):
    """W2 act(W1 x): "Attention Is All You Need" section 3.3; gated, W2 (act(W1 x) * W3 x) (arXiv 2002.05202).

    Args:
        d_model: width of input and output.
        d_ff: hidden width.
        activation: relu, gelu, gelu-tanh (its approximation), silu; gated: swiglu, geglu, geglu-tanh.
        bias: whether the projections have biases.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        self.d_model, self.d_ff, self.activation = d_model, d_ff, activation
        self.gated = activation in GATED
        self.function = activation_function(activation)
        self.up = nn.Linear(d_model, 2 * d_ff if self.gated else d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        ragged: Ragged | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        """x: [batch, length, d_model] -> the same shape; the contract of a mixer, with nothing to remember."""
        hidden = self.up(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.function(gate) * value
        else:
            hidden = self.function(hidden)
        return self.down(hidden), state

    def init_state(
        self,
        rows: int,
        capacity: int | None = None,
        rewind: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """Nothing is remembered."""
        return NoState()

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """None."""
        return 0

    def flops(self, length: int, context: int = 0) -> int:
        """Forward FLOPs of `length` tokens."""
        return 2 * length * self.d_model * self.d_ff * (3 if self.gated else 2)
