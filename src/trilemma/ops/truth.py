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
    return int(torch.randint(low, high + 1, (), generator=generator, device="cpu"))


def drawn_normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal values on the default device, the same on every device."""
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def drawn_uniform(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Values in [0, 1) on the default device, the same on every device."""
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)
