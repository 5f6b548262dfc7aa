"""Feed-forward net over the last n tokens, as n-gram language models had it (Bengio et al. 2003, "A neural
probabilistic language model"; relu as in Vaswani et al. 2013, "Decoding with large-scale neural language models").

    y_t = W_2 act(W_1 [x_{t-n+1}; ...; x_t] + b_1) + b_2

Before a sequence's beginning stand zeros. A learned start vector s would be the same net on inputs x - s, with
W_1 [s; ...; s] in b_1: the shift of the LayerNorm before this layer learns it already.

Legend: B rows, L length, D d_model, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError
from trilemma.mixers.base import Capabilities, Mixer
from trilemma.nn.convolution import DenseConvolution
from trilemma.ragged import Ragged
from trilemma.registry import register_mixer
from trilemma.state import State


@dataclass
class NgramState(State):
    """tail: [rows, n - 1, d_model] the last inputs, zeros before the first."""

    tail: Tensor


@register_mixer("ngram")
class Ngram(Mixer):
    """A layer that sees the last n tokens and nothing before them.

    Args:
        d_model: width of input and output.
        causal: must be True; in encoders the wrapper `bidirectional` runs it both ways.
        n: tokens seen, the newest included, at least 2. What predicts the next token from 5 is a 6-gram model.
        hidden: H; None: d_model.
        activation: tanh or relu.
    """

    capabilities = Capabilities(constant_state=True)

    def __init__(
        self,
        d_model: int,
        causal: bool = True,
        n: int = 5,
        hidden: int | None = None,
        activation: Literal["tanh", "relu"] = "tanh",
    ) -> None:
        super().__init__(d_model, causal)
        if n < 2:
            raise ConfigError(f"ngram: n must be at least 2 to see another token, found {n}")
        if activation not in ("tanh", "relu"):
            raise ConfigError(f'ngram: unknown activation "{activation}"')
        self.n, self.hidden = n, hidden or d_model
        self.activation = torch.tanh if activation == "tanh" else torch.relu
        self.up = DenseConvolution(d_model, self.hidden, n)
        self.down = nn.Linear(self.hidden, d_model)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Both activations, several n."""
        return [{}, {"n": 2, "hidden": 12, "activation": "relu"}, {"n": 8}]

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> NgramState:
        """Zeros: nothing read yet."""
        return NgramState(self.up.new_tail(rows, dtype, device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, NgramState)
        hidden, tail = self.up(x, None if state is None else state.tail, ragged)
        y = self.down(self.activation(hidden))
        return y, None if tail is None else NgramState(tail)

    def count_parameters(self) -> int:
        """H (n D + 1) + D (H + 1)."""
        return self.up.count_parameters() + self.d_model * (self.hidden + 1)

    def flops(self, length: int, context: int = 0) -> int:
        """2 (n + 1) D H a token."""
        return self.up.flops(length) + 2 * length * self.d_model * self.hidden

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """(n - 1) D elements."""
        return (self.n - 1) * self.d_model * dtype.itemsize
