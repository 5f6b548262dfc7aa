"""The diagonal scan: h_t = a_t h_{t-1} + b_t, element by element.

The core of Mamba (arXiv 2312.00752), of RG-LRU (arXiv 2402.19427) and of every recurrence without mixing between its
cells. It runs in place as a parallel prefix (Brent and Kung 1982, "A regular layout for parallel adders"): neighbours
merge into pairs, the pairs are scanned the same way, and what lies between them follows. That takes 2 log2(L) rounds
and 3 L products in all. Only products of a are formed, never quotients: a closed gate is an exact zero.

The gradient is the same scan run backwards, so that no round is remembered:

    grad b_t = g_t + a_{t+1} grad b_{t+1},    grad a_t = h_{t-1} grad b_t

Legend: B rows, L length, * any further axes (channels, a channel's state).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilemma.ops.mixing import mixes
from trilemma.ops.truth import TruthPair, drawn_integer, drawn_normal, drawn_uniform


def diagonal_scan_naive(a: Tensor, b: Tensor, state: Tensor | None = None) -> Tensor:
    """The recurrence, token by token: the reference for `diagonal_scan`, whose arguments it takes."""
    h = torch.zeros_like(b[:, 0]) if state is None else state
    states = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1)


@mixes("b", axes="blh")
def diagonal_scan(a: Tensor, b: Tensor, state: Tensor | None = None) -> Tensor:
    """All states, with memory for one more tensor of b's size.

    Args:
        a: [B, L, *] decay, in [0, 1]; 0 where a packed sequence begins, 1 at padding.
        b: [B, L, *] what each token adds; 0 at padding.
        state: [B, *] before the first token, or None for zeros.

    Returns:
        h [B, L, *]; the last state is h[:, -1].
    """
    state = torch.zeros_like(b[:, 0]) if state is None else state
    h: Tensor = _DiagonalScan.apply(a, b, state)  # type: ignore[no-untyped-call]
    return h


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        h = b.clone()
        h[:, 0].addcmul_(a[:, 0], state)
        scan_(a[:, 1:], h)
        ctx.save_for_backward(a, h, state)
        return h

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, state = ctx.saved_tensors
        grad_b = grad_h.clone()
        scan_(a[:, 1:], grad_b, reverse=True)
        return before(h, state).mul_(grad_b), grad_b, a[:, 0] * grad_b[:, 0]


def before(h: Tensor, state: Tensor) -> Tensor:
    """A new tensor with the states [B, L, *] before each token, from those after it and the one before the first."""
    return torch.cat([state[:, None], h[:, :-1]], dim=1)


def scan_(links: Tensor, h: Tensor, reverse: bool = False) -> None:
    """Adds to each h_t its decayed predecessor, from the first token to the last, in place.

    Args:
        links: [B, L - 1, *] the decay between each token and the next.
        h: [B, L, *].
        reverse: from the last token to the first.
    """
    length = h.shape[1]
    if length < 2:
        return
    pairs, odd = divmod(length, 2)
    skip = odd if reverse else 0  # an odd token out is the last to be reached
    within, between = links[:, skip::2], links[:, 1 - skip :: 2]
    if reverse:
        first, second, rest = h[:, 1 + odd :: 2], h[:, odd::2], h[:, 1 - odd : length - 2 : 2]
        joined, reached = between[:, skip : skip + pairs - 1] * within[:, : pairs - 1], second[:, 1 - odd :]
    else:
        first, second, rest = h[:, : 2 * pairs : 2], h[:, 1::2], h[:, 2::2]
        joined, reached = between[:, : pairs - 1] * within[:, 1:], second[:, : rest.shape[1]]
    second.addcmul_(within, first)
    scan_(joined, second, reverse)
    rest.addcmul_(between, reached)


def _draw(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Any length; decays near one, near zero and exactly zero; one or two further axes; with or without a state."""
    batch, length = drawn_integer(generator, 1, 3), drawn_integer(generator, 1, 40)
    axes = [drawn_integer(generator, 1, 4) for _ in range(drawn_integer(generator, 1, 2))]
    strength, carried = (0.01, 1.0, 50.0)[drawn_integer(generator, 0, 2)], drawn_integer(generator, 0, 1) == 1
    a = torch.exp(-strength * drawn_uniform(generator, dtype, batch, length, *axes))
    resets = drawn_uniform(generator, dtype, batch, length, *[1] * len(axes)) < 0.1
    return {
        "a": a.masked_fill(resets, 0),
        "b": drawn_normal(generator, dtype, batch, length, *axes),
        "state": drawn_normal(generator, dtype, batch, *axes) if carried else None,
    }


DIAGONAL_SCAN = TruthPair(
    "diagonal_scan",
    lambda **given: (diagonal_scan(**given),),
    lambda **given: (diagonal_scan_naive(**given),),
    _draw,
)
