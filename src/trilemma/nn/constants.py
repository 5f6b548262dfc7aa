"""Tables that are the same at every call.

A module must not hold them as buffers: `.to(torch.bfloat16)` would round them, and rounded frequencies turn far tokens
by other angles without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVarTuple

import torch
from torch import Tensor

Ts = TypeVarTuple("Ts")


def kept(build: Callable[[*Ts], Tensor]) -> Callable[[*Ts], Tensor]:
    """Keeps what a function of hashable arguments, device and type among them, returned. Nobody writes to it."""

    @functools.lru_cache(maxsize=64)
    def once(*args: *Ts) -> Tensor:
        with torch.inference_mode(False):  # a tensor of inference mode could not be used under autograd later
            return build(*args)

    @functools.wraps(build)
    def call(*args: *Ts) -> Tensor:
        return build(*args) if torch.compiler.is_compiling() else once(*args)

    return call


@kept
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)]."""
    return torch.tensor(values, dtype=dtype, device=device)
