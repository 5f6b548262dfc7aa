"""The position-wise feed-forward layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeedForward(nn.Module):
    """W2 act(W1 x): "Attention Is All You Need" section 3.3; `swiglu` is W2 (silu(W1 x) * W3 x) (arXiv 2002.05202).

    Args:
        d_model: width of input and output.
        d_ff: hidden width.
        activation: relu, gelu or swiglu.
        bias: whether the projections have biases.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        self.d_model, self.d_ff, self.activation = d_model, d_ff, activation
        self.gated = activation == "swiglu"
        self.up = nn.Linear(d_model, 2 * d_ff if self.gated else d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_model] -> [..., d_model]."""
        hidden = self.up(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = nn.functional.silu(gate) * value
        elif self.activation == "gelu":
            hidden = nn.functional.gelu(hidden)
        else:
            hidden = torch.relu(hidden)
        out: Tensor = self.down(hidden)
        return out

    def flops(self, length: int) -> int:
        """Forward FLOPs of `length` tokens."""
        return 2 * length * self.d_model * self.d_ff * (3 if self.gated else 2)
