"""Block-diagonal linear maps: channels in groups, each group with a small matrix of its own.

Legend: D channels, G groups, W channels of a group (D = G W).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.errors import ConfigError


class BlockDiagonal(nn.Module):
    """y = W x + b with a block-diagonal W: D^2 / G weights.

    Args:
        channels: D.
        groups: G, a divisor of D.
        bias: whether b is learned; zero at first.
        std: of the normal distribution that the weights start from.
    """

    def __init__(self, channels: int, groups: int, bias: bool, std: float) -> None:
        super().__init__()
        if channels % groups:
            raise ConfigError(f"{channels} channels cannot be split into {groups} groups")
        width = channels // groups
        self.weight = nn.Parameter(torch.randn(groups, width, width) * std)  # [G, W out, W in]
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> the same shape."""
        groups, width, _ = self.weight.shape
        grouped = x.reshape(-1, groups, width).permute(1, 2, 0)  # tokens last: small blocks then make long rows
        y = (self.weight @ grouped).permute(2, 0, 1).reshape(x.shape)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def count_parameters(self) -> int:
        """D W, and the biases."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, length: int) -> int:
        """2 D W a token."""
        return 2 * length * self.weight.numel()
