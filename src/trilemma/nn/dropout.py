"""Dropout with cheap random numbers on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_BITS = 16  # random bits that decide on one element: four elements share a draw of 64


class Dropout(nn.Module):
    """Sets each element to zero with probability p and divides the others by 1 - p (Srivastava et al. 2014).

    torch's own form takes a draw of its generator for each element; in a small model that is a tenth of a training step
    on a CPU. Here one draw decides on four elements, with p rounded to a multiple of 2^-16 (the division takes the
    rounded p, so the mean stays). Elsewhere, and in compiled code, it is torch's form.

    Args:
        p: in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.threshold = min(round(p * 2**_BITS), 2**_BITS - 1)

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> the same shape; x itself outside training."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_dynamo_compiling():
            return nn.functional.dropout(x, self.p)
        y: Tensor = x * self._factors(x)
        return y

    def _factors(self, x: Tensor) -> Tensor:
        """As x: 0 with the probability p, else 1 / (1 - p). As numbers, not as a mask, whose products are slow."""
        count = math.prod(x.shape)
        draws = torch.empty(-(-count * _BITS // 64), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
        numbers = draws.view(torch.int16)[:count].view(x.shape)  # uniform from -2^15 to 2^15 - 1
        kept = numbers >= self.threshold - 2 ** (_BITS - 1)
        factors: Tensor = kept.to(x.dtype).mul_(1 / (1 - self.threshold / 2**_BITS))
        return factors

    def extra_repr(self) -> str:
        """As of `nn.Dropout`."""
        return f"p={self.p}"
