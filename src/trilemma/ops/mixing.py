"""Operators that are linear in their values: per head y = M v, where M is made of queries, keys, gates and decays.

Attention's M is its map of weights; a linear recurrence has one too, though it never writes it down. An operator says
that it has one by `@mixes("v")`. Who wants to see it watches:

    with watched() as calls:
        model(tokens)
    calls[0].matrix()

M is found by running the operator on one-hot values, so no operator needs code for it.

Legend: B rows, H heads, L length, K positions of the values (L, but for a memory), F value dimension.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

Axes = Literal["bhlf", "blhf", "blh"]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_watching: list[list[MixingCall]] = []


@dataclass(frozen=True)
class MixingCall:
    """One call of an operator.

    Attributes:
        operator: its function, and `arguments` what it was given.
        argument: the name of the values among them.
        axes: of values and output.
        output: the operator's own, as it came.
    """

    operator: Callable[..., Any]
    arguments: dict[str, Any]
    argument: str
    axes: Axes
    output: Tensor

    @property
    def name(self) -> str:
        """The operator's."""
        return self.operator.__name__.strip("_")

    @property
    def values(self) -> Tensor:
        """v [B, H, K, F], where H may be the smaller number of heads that share values."""
        return self._ordered(self.arguments[self.argument])

    @property
    def mixed(self) -> Tensor:
        """y [B, H, L, F]."""
        return self._ordered(self.output)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """M [B, H, L, K] with y = M v; a feature of its own decay or filter counts as a head."""
        values, mixed = self.arguments[self.argument], self.mixed
        axis = 2 if self.axes == "bhlf" else 1
        matrix = mixed.new_empty(*mixed.shape[:3], values.shape[axis])
        for position in range(values.shape[axis]):
            hot = torch.zeros_like(values)
            hot.select(axis, position).fill_(1)
            output = _first(self.operator(**self.arguments | {self.argument: hot}))
            matrix[..., position] = self._ordered(output)[..., 0]
        return matrix

    @torch.no_grad()
    def error(self, matrix: Tensor) -> float:
        """The largest difference of M v from y, in parts of y's largest value (or of 1)."""
        mixed = self.mixed.double()
        values = self.values.double()
        values = values.repeat_interleave(mixed.shape[1] // values.shape[1], dim=1)
        difference = (matrix.double() @ values - mixed).abs().max()
        return float(difference / mixed.abs().max().clamp(min=1))

    def _ordered(self, tensor: Tensor) -> Tensor:
        """[B, H, L, F] out of an argument's order."""
        if self.axes == "blh":
            return tensor.flatten(2).transpose(1, 2).unsqueeze(3)
        return tensor.transpose(1, 2) if self.axes == "blhf" else tensor


def mixes(argument: str, axes: Axes = "bhlf") -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Declares that an operator is linear in an argument; its output, or the first of them, has the same axes.

    Args:
        argument: the name of the values.
        axes: bhlf, blhf, or blh for values whose every feature is mixed in its own way.
    """

    def declare(operator: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(operator)

        @functools.wraps(operator)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if not _watching:
                return operator(*args, **kwargs)
            calls = _watching.pop()  # an operator within an operator is its own affair
            try:
                result = operator(*args, **kwargs)
            finally:
                _watching.append(calls)
            given = signature.bind(*args, **kwargs).arguments
            calls.append(MixingCall(operator, dict(given), argument, axes, _first(result)))
            return result

        return call

    return declare


@contextmanager
def watched() -> Iterator[list[MixingCall]]:
    """The calls of such operators within the block, in order. It holds their tensors: for looking, not for training."""
    calls: list[MixingCall] = []
    _watching.append(calls)
    try:
        yield calls
    finally:
        _watching.remove(calls)


def _first(result: Any) -> Tensor:
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output
