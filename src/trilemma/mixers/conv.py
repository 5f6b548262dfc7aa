"""Gated convolution over neighbouring tokens (ConvS2S, Gehring et al. 2017, arXiv 1705.03122; gates of Dauphin et al.
2016, arXiv 1612.08083).

    a_t, b_t = split(W [x_{t-left}; ...; x_{t+right}] + c);  y_t = a_t * s(b_t)

s is the logistic function, left + right + 1 the kernel's size. Causal: right = 0. In both directions: left and right
differ by one at most, the longer side being the right one. Beyond a sequence's ends stand zeros. The convolution mixes
all channels; ConvS2S wraps it in weight normalisation and a scaled residual connection, which are the stack's business.

Legend: B rows, L length, D d_model, K kernel size, H hidden.
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
from trilemma.nn.convolution import DenseConvolution
from trilemma.ragged import Ragged
from trilemma.registry import register_mixer
from trilemma.state import State


@dataclass
class ConvState(State):
    """tail: [rows, kernel_size - 1, d_model] the last inputs, zeros before the first."""

    tail: Tensor


@register_mixer("conv")
class Conv(Mixer):
    """A ConvS2S layer: dense convolution and gated linear unit.

    Args:
        d_model: width of input and output.
        causal: False: the window is centred on its token.
        kernel_size: tokens seen, at least 2; the paper's deep nets have 3.
        hidden: channels after the gate; None: d_model. Another number adds an output projection.
    """

    capabilities = Capabilities(bidirectional=True, constant_state=True)

    def __init__(self, d_model: int, causal: bool = True, kernel_size: int = 3, hidden: int | None = None) -> None:
        super().__init__(d_model, causal)
        if kernel_size < 2:
            raise ConfigError(f"conv: kernel_size must be at least 2 to see a neighbour, found {kernel_size}")
        self.kernel_size, self.hidden = kernel_size, hidden or d_model
        self.convolution = DenseConvolution(d_model, 2 * self.hidden, kernel_size, causal)
        self.out = nn.Linear(self.hidden, d_model) if self.hidden != d_model else None
        # The paper's section 3.5: a gate lets about a quarter of the variance through.
        nn.init.normal_(self.convolution.weight, std=math.sqrt(4 / (kernel_size * d_model)))
        if self.out is not None:
            nn.init.normal_(self.out.weight, std=math.sqrt(1 / self.hidden))
            nn.init.zeros_(self.out.bias)

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Windows of several sizes, causal and centred, and with an output projection."""
        return [
            {},
            {"kernel_size": 2, "hidden": 12},
            {"kernel_size": 7},
            {"causal": False},
            {"causal": False, "kernel_size": 6, "hidden": 12},
        ]

    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> ConvState:
        """Zeros: nothing read yet."""
        return ConvState(self.convolution.new_tail(rows, dtype, device))

    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        assert state is None or isinstance(state, ConvState)
        both, tail = self.convolution(x, None if state is None else state.tail, ragged)
        y = nn.functional.glu(both)
        if self.out is not None:
            y = self.out(y)
        return y, None if tail is None else ConvState(tail)

    def count_parameters(self) -> int:
        """2 H (K D + 1), and the output projection."""
        count = self.convolution.count_parameters()
        return count + (self.d_model * (self.hidden + 1) if self.out is not None else 0)

    def flops(self, length: int, context: int = 0) -> int:
        """4 K D H a token, and the output projection."""
        projection = 2 * length * self.hidden * self.d_model if self.out is not None else 0
        return self.convolution.flops(length) + projection

    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """(K - 1) D elements."""
        return (self.kernel_size - 1) * self.d_model * dtype.itemsize
