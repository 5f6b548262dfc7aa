"""Inverses of small unit lower triangular matrices, in batches.

    [P   ]^-1   [    P^-1            ]
    [R  Q]    = [-Q^-1 R P^-1   Q^-1 ]

halved down to single numbers, both halves at once. What is computed on the way are blocks of the result itself, so that
nothing grows that the result does not hold; the powers of a Neumann series may grow without bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + A)^-1, where A is the strictly lower part of `a`; what else `a` holds is ignored.

    Args:
        a: [..., C, C], float32 or float64. A power of two is fastest.
    """
    size = a.shape[-1]
    rest = _filled(size) - size
    with torch.autocast(a.device.type, enabled=False):
        filled = torch.nn.functional.pad(a, (0, rest, 0, rest)) if rest else a
        inverse: Tensor = _UnitLowerInverse.apply(filled)  # type: ignore[no-untyped-call]
    return inverse[..., :size, :size]


class _UnitLowerInverse(torch.autograd.Function):
    """T = (I + A)^-1 with dT = -T dA T: the gradient needs T alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        inverse = _inverse(a)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        across: Tensor = inverse.transpose(-1, -2)
        below = torch.ones(across.shape[-2:], dtype=gradient.dtype, device=gradient.device).tril(-1)
        return across @ gradient @ across * -below


def _inverse(a: Tensor) -> Tensor:
    half = a.shape[-1] // 2
    if half == 0:
        return torch.ones_like(a)
    blocks = torch.stack([a[..., :half, :half], a[..., half:, half:]], dim=-3)
    first, second = _inverse(blocks).unbind(-3)
    corner = -(second @ a[..., half:, :half] @ first)
    upper = torch.nn.functional.pad(first, (0, half))
    return torch.cat([upper, torch.cat([corner, second], dim=-1)], dim=-2)


def unit_lower_inverse_flops(size: int) -> int:
    """FLOPs of the matrix products of one inverse, forward: 4 h^3 for each pair of blocks of size h."""
    size = _filled(size)
    return sum(2 * size * (1 << level) ** 2 for level in range(size.bit_length() - 1))


def _filled(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
