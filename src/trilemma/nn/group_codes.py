"""4-bit codes with one scale for each group of a row's neighbours: x ~ codes * scale."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # values that share a scale
_LOWEST, _HIGHEST = -8, 7
_SMALLEST = 1e-30  # scale of a group of zeros
# What the value farthest from zero is coded as, tried in turn: 7 spans both signs alike, 8 uses the sixteenth code, and
# beyond it that value is clipped, so that all others are coded more finely.
_LEVELS = (6.0, 6.5, 7.0, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5, 9.0)


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit codes of each row's groups, with the scale of least squared error of ten that are tried.

    Args:
        x: [N, K], K a multiple of 32. A group that holds what is not a finite number gets a scale that is none.

    Returns:
        codes [N, K] int8, -8 to 7; scale [N, K / 32] float32, of either sign.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    codes = torch.zeros_like(groups)
    scale, least = torch.full_like(farthest, torch.nan), torch.full_like(farthest, torch.inf)
    for level in _LEVELS:
        tried = -farthest / level
        tried = tried.where(tried != 0, _SMALLEST)
        found = (groups / tried).round_().clamp_(_LOWEST, _HIGHEST)
        error = (found * tried - groups).square_().sum(-1, keepdim=True)
        better = error < least
        codes, scale, least = (torch.where(better, *pair) for pair in ((found, codes), (tried, scale), (error, least)))
    return codes.flatten(-2).to(torch.int8), scale.squeeze(-1)


def join_codes(codes: Tensor) -> Tensor:
    """[N, K] int8, -8 to 7 -> [N, K / 2] uint8: two codes a byte, the first in its lower half."""
    first, second = (codes - _LOWEST).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    joined: Tensor = first | (second << 4)
    return joined


def values_of(joined: Tensor, scale: Tensor) -> Tensor:
    """What the codes stand for.

    Args:
        joined: [N, K / 2] uint8. scale: [N, K / 32] float32.

    Returns:
        [N, K] float32.
    """
    codes = torch.stack((joined & 15, joined >> 4), -1).flatten(-2).float() + _LOWEST
    values: Tensor = codes.unflatten(-1, (-1, GROUP)) * scale[..., None]
    return values.flatten(-2)
