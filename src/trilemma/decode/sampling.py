"""Random draws that depend on nothing but (seed, input, sample, position), and the filters of sampling.

References: Fan et al. 2018 (top-k, arXiv 1805.04833); Holtzman et al. 2020 (top-p, arXiv 1904.09751); the mixing
function is SplitMix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One SplitMix64 output of each counter; arithmetic modulo 2 ** 64."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))


def uniform(seed: int, indices: NDArray[np.int64], samples: NDArray[np.int64], position: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each (input, sample), a pure function of its arguments.

    Args:
        seed: any integer (taken modulo 2 ** 64).
        indices, samples: [rows] input numbers, and numbers of the sample of one input.
        position: the new token's position, from 0.
    """
    state = np.full(indices.shape, seed % 2**64, dtype=np.uint64)
    for part in (indices.astype(np.uint64), samples.astype(np.uint64), np.full_like(state, position)):
        state = _mix(_mix(state) ^ part)
    # 53 bits: every value is exact in float64 and below 1
    draws: NDArray[np.float64] = (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draws


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token a row by inverting the cumulative distribution, in float64.

    Filters apply in the order temperature, top-k (the k likeliest), top-p (the fewest likeliest whose probabilities,
    renormalised after top-k, sum to at least p); at least one token stays.

    Args:
        logits: [rows, vocab]; uniforms: [rows] in [0, 1).

    Returns:
        tokens [rows], and the margin [rows]: the distance of the draw to the nearest border of its token's interval.
    """
    scaled = logits.double() / temperature
    order: Tensor | None = None
    if top_k is not None or top_p is not None:
        kept = min(top_k or scaled.shape[-1], scaled.shape[-1])
        # a stable sort: of equally likely tokens the lower id comes first, on every device and in every batch
        scaled, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
        scaled, order = scaled[:, :kept], order[:, :kept]
    probabilities = torch.softmax(scaled, dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0.0)
    cumulative = probabilities.cumsum(-1)
    targets = (uniforms.to(cumulative) * cumulative[:, -1]).unsqueeze(-1)
    chosen = torch.searchsorted(cumulative, targets, right=True)
    # rounding may place a draw behind the last token that has any probability
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).long().argmax(-1, keepdim=True)
    chosen = torch.minimum(chosen, last)
    upper = cumulative.gather(-1, chosen)
    lower = upper - probabilities.gather(-1, chosen)
    margin = torch.minimum(upper - targets, targets - lower).abs()
    # the outer borders of the whole distribution decide nothing
    margin = torch.where(probabilities.gather(-1, chosen) >= cumulative[:, -1:], torch.inf, margin)
    tokens = chosen if order is None else order.gather(-1, chosen)
    return tokens.squeeze(-1), margin.squeeze(-1)
