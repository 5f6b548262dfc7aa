"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 at least (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        dim: size of the last axis.
        epsilon: added to the mean square.
        affine: whether a weight is learned.
    """

    def __init__(self, dim: int, epsilon: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.dim, self.epsilon = dim, epsilon
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] -> same shape and type."""
        wide = x if self.weight is None else x.to(torch.promote_types(x.dtype, self.weight.dtype))  # under autocast
        return nn.functional.rms_norm(wide, (self.dim,), self.weight, self.epsilon).to(x.dtype)


def make_norm(kind: str, dim: int, epsilon: float, bias: bool = True) -> nn.Module:
    """`layernorm` (Ba et al. 2016, arXiv 1607.06450) or `rmsnorm` over the last axis of size `dim`."""
    if kind == "layernorm":
        return nn.LayerNorm(dim, eps=epsilon, bias=bias)
    return RMSNorm(dim, epsilon)


def unit_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """x / sqrt(sum of squares + epsilon) over the last axis: norm 1, and zeros stay zeros.

    Args:
        x: [..., dim], float32 at least.
        epsilon: added to the sum of squares.
    """
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + epsilon)
