"""Pairs of a fast operator and its naive reference, which the law "truth" compares over random shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TruthPair:
    """A fast form and the equation as written.

    Attributes:
        name: the operator.
        fast, naive: take the same keyword arguments and return tensors in the same order (None where not wanted).
        draw: random arguments in a given type from a generator; float tensors among them are differentiated.
    """

    name: str
    fast: Callable[..., tuple[Tensor, ...]]
    naive: Callable[..., tuple[Tensor, ...]]
    draw: Callable[[torch.Generator, torch.dtype], dict[str, Any]]


def drawn_integer(generator: torch.Generator, low: int, high: int) -> int:
    """A number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
