"""Short convolutions over the length, the last inputs carried as a tail: one filter a channel, or all channels mixed.

Legend: B rows, L length, D channels, K taps, E output channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trilemma.ragged import Ragged
from trilemma.state import updated


def extended(x: Tensor, tail: Tensor | None, taps: int) -> Tensor:
    """The inputs with what came before them, zeros at a sequence's beginning.

    Args:
        x: [B, L, D].
        tail: [B, taps - 1, D] the inputs before this call, or None.
        taps: K.

    Returns:
        [B, K - 1 + L, D]; the inputs of token t are at t ... t + K - 1.
    """
    if tail is None:
        return nn.functional.pad(x, (0, 0, taps - 1, 0))
    return torch.cat([tail.to(x.dtype), x], dim=1)


def next_tail(tail: Tensor, line: Tensor, ragged: Ragged | None) -> Tensor:
    """The tail after a call: each row's last K - 1 valid inputs.

    Args:
        tail: [B, K - 1, D] the State's, before the call.
        line: what `extended` returned.
        ragged: the call.
    """
    kept = tail.shape[1]
    if ragged is None or ragged.lengths is None:
        return updated(tail, line[:, line.shape[1] - kept :].to(tail.dtype))
    index = ragged.lengths[:, None] + torch.arange(kept, device=line.device)
    return updated(tail, line.gather(1, index[:, :, None].expand(-1, -1, line.shape[2])).to(tail.dtype))


def _depthwise(line: Tensor, weight: Tensor) -> Tensor:
    """[B, L + K - 1, D], [K, D] -> [B, L, D], with channels last throughout: nothing is transposed in memory."""
    filters = weight.t()[:, None, None]
    return nn.functional.conv2d(line.transpose(1, 2)[:, :, None], filters, groups=len(filters))[:, :, 0].transpose(1, 2)


class _Depthwise(torch.autograd.Function):
    """`_depthwise`, with a backward several times as fast on CPUs as torch's own, which has no kernel for few taps."""

    @staticmethod
    def forward(ctx: Any, line: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(line, weight)
        return _depthwise(line, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        line, weight = ctx.saved_tensors
        taps, length, gradient = len(weight), gradient.shape[1], gradient.to(line.dtype)
        padded = nn.functional.pad(gradient, (0, 0, taps - 1, taps - 1))
        for_weight = [(gradient * line[:, j : j + length]).sum((0, 1)) for j in range(taps)]
        return _depthwise(padded, weight.flip(0)), torch.stack(for_weight)


class ShortConvolution(nn.Module):
    """y_t = activation(b + sum_j w_j * x_(t - K + 1 + j)), a filter of K taps for each channel.

    Args:
        channels: D.
        taps: K.
        bias: whether b is learned.
        activation: SiLU after it.
    """

    def __init__(self, channels: int, taps: int = 4, bias: bool = False, activation: bool = True) -> None:
        super().__init__()
        self.taps, self.activation = taps, activation
        bound = 1 / math.sqrt(taps)  # torch's own for a depthwise convolution
        self.weight = nn.Parameter(torch.empty(taps, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def new_tail(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros [rows, K - 1, D]: nothing read yet."""
        return torch.zeros(rows, self.taps - 1, self.weight.shape[1], dtype=dtype, device=device)

    def forward(self, x: Tensor, tail: Tensor | None, ragged: Ragged | None) -> tuple[Tensor, Tensor | None]:
        """Convolves the tokens of one call.

        Args:
            x: [B, L, D]. tail: [B, K - 1, D] from `new_tail` or an earlier call; None: whole sequences.
            ragged: the call; nothing crosses the borders of packed sequences.

        Returns:
            y of x's shape and type, and the tail to go on with (None without one).
        """
        length = x.shape[1]
        line = extended(x, tail, self.taps)
        weight = self.weight.to(x.dtype)
        places = ragged.packed_positions if ragged is not None else None
        if places is None and length > 1:
            y: Tensor = _Depthwise.apply(line, weight)  # type: ignore[no-untyped-call]
        else:
            # Rounded once, like the kernel's sums: a call of one token gives what a call of many gives.
            precise = torch.promote_types(x.dtype, torch.float32)
            inputs, filters = line.to(precise), weight.to(precise)
            if places is None:
                y = (inputs * filters).sum(1, keepdim=True).to(x.dtype)
            else:  # a tap reaches back no further than its sequence's first token
                terms = [inputs[:, j : j + length] * filters[j] for j in range(self.taps)]
                seen = [(places >= self.taps - 1 - j)[:, :, None] for j in range(self.taps)]
                y = torch.stack([term * near for term, near in zip(terms, seen, strict=True)]).sum(0).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.activation:
            y = nn.functional.silu(y)
        return y, None if tail is None else next_tail(tail, line, ragged)

    def count_parameters(self) -> int:
        """K D, and the biases."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, length: int) -> int:
        """2 K D a token; a single token's products are element by element, which no cost formula counts."""
        return 2 * length * self.weight.numel() if length > 1 else 0


class DenseConvolution(nn.Module):
    """y_t = b + sum_j W_j x_(t - before + j): the K tokens around t, all their channels mixed; zeros beyond the ends.

    Args:
        channels: D.
        outputs: E.
        taps: K.
        causal: before = K - 1; else (K - 1) // 2, the window being centred.

    Attributes:
        weight: [E, D, K], torch's layout. Drawn by Xavier's rule for D K inputs and E outputs.
        bias: [E] zeros.
    """

    def __init__(self, channels: int, outputs: int, taps: int, causal: bool = True) -> None:
        super().__init__()
        self.taps, self.causal = taps, causal
        self.before = taps - 1 if causal else (taps - 1) // 2
        bound = math.sqrt(6 / (channels * taps + outputs))
        self.weight = nn.Parameter(torch.empty(outputs, channels, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def new_tail(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros [rows, K - 1, D]: nothing read yet."""
        return torch.zeros(rows, self.taps - 1, self.weight.shape[1], dtype=dtype, device=device)

    def forward(self, x: Tensor, tail: Tensor | None, ragged: Ragged | None) -> tuple[Tensor, Tensor | None]:
        """Convolves the tokens of one call.

        Args:
            x: [B, L, D], zero at padding.
            tail: [B, K - 1, D] from `new_tail` or an earlier call; None: whole sequences.
            ragged: the call; nothing crosses the borders of packed sequences.

        Returns:
            y [B, L, E] of x's type, and the tail to go on with (None without one).
        """
        length = x.shape[1]
        if self.causal:
            line = extended(x, tail, self.taps)
        else:
            line = nn.functional.pad(x, (0, 0, self.before, self.taps - 1 - self.before))
        segments = ragged.segments if ragged is not None else None
        if length > 1 and segments is None:
            y = nn.functional.conv1d(line.transpose(1, 2), self.weight, self.bias).transpose(1, 2)
        else:
            seen = [line[:, j : j + length] for j in range(self.taps)]
            if segments is not None:
                numbers = nn.functional.pad(segments, (self.before, self.taps - 1 - self.before), value=-1)
                others = [(numbers[:, j : j + length] != segments)[:, :, None] for j in range(self.taps)]
                seen = [inputs.masked_fill(other, 0) for inputs, other in zip(seen, others, strict=True)]
            y = nn.functional.linear(torch.stack(seen, dim=-1).flatten(2), self.weight.flatten(1), self.bias)
        return y, None if tail is None else next_tail(tail, line, ragged)

    def count_parameters(self) -> int:
        """E (K D + 1)."""
        return self.weight.numel() + len(self.bias)

    def flops(self, length: int) -> int:
        """2 K D E a token."""
        return 2 * length * self.weight.numel()
