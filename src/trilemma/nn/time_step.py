"""Step sizes of state-space mixers: how far the discretised system moves at a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def time_step_bias(size: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """Biases whose softplus is log-uniform between `low` and `high`, at least `floor` (Mamba, arXiv 2312.00752).

    Returns:
        [size].
    """
    steps = torch.exp(torch.empty(size).uniform_(math.log(low), math.log(high))).clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus
