"""How a batch of sequences is cut into calls, and run that way.

Legend: B rows, L length, N calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.laws.case import Case
from trilemma.ragged import Ragged
from trilemma.state import State

STYLES = ("ones", "halves", "random", "uneven", "whole")


def draw_plan(case: Case, lengths: Tensor, style: str | None = None) -> Tensor:
    """[N, B] how many tokens of each row a call reads; columns sum to `lengths` [B].

    Styles: one token a call, two halves, random chunks, rows at different speeds (some wait), all at once.
    """
    style = style or STYLES[case.integer(0, len(STYLES) - 1)]
    left = lengths.clone()
    calls = []
    longest = int(lengths.max())
    while int(left.max()) > 0:
        if style == "ones":
            take = torch.ones_like(left)
        elif style == "halves":
            take = torch.full_like(left, (longest + 1) // 2)
        elif style == "random":
            take = torch.full_like(left, case.integer(1, max(longest // 2, 1)))
        elif style == "uneven":
            take = case.integers(len(left), 0, max(longest // 2, 1))
            if not bool((take.minimum(left) > 0).any()):
                continue
        else:
            take = left.clone()
        take = take.minimum(left)
        calls.append(take)
        left = left - take
    return torch.stack(calls)


def run_calls(case: Case, x: Tensor, plan: Tensor, state: State, prefix: Tensor | None = None) -> tuple[Tensor, State]:
    """Runs sequences x [B, L, D] by a plan; returns y, zero beyond each row's end, and the last State.

    Padding within a call is spoiled. Where all rows take as many tokens, a coin decides whether lengths are given.
    A `prefix` [B] lies within the first call.
    """
    rows, length, _ = x.shape
    begins = torch.zeros(rows, dtype=torch.int64)
    pieces: list[list[Tensor]] = [[] for _ in range(rows)]
    for number, count in enumerate(plan):
        width = int(count.max()) + (case.integer(0, 2) if case.flip() else 0)
        uniform = bool((count == width).all())
        index = (begins[:, None] + torch.arange(width)).clamp(max=length - 1)
        part = x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
        ragged = None
        if not uniform or case.flip():
            ragged = Ragged(lengths=count)
            part = case.spoiled(part, torch.arange(width) < count[:, None])
        if number == 0 and prefix is not None:
            ragged = Ragged(lengths=None if ragged is None else count, prefix=prefix)
        y, state = case.step(part, state, ragged)
        case.finite(y, "y", "padding gives finite outputs")
        for row in range(rows):
            pieces[row].append(y[row, : int(count[row])])
        begins = begins + count
    joined = [torch.cat(parts) for parts in pieces]
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True), state


def padded(y: Tensor, length: int) -> Tensor:
    """y [B, n, D] with zeros up to `length`."""
    return torch.nn.functional.pad(y, (0, 0, 0, length - y.shape[1]))


def valid_tokens(lengths: Tensor, length: int) -> Tensor:
    """[B, L] True at real tokens."""
    return torch.arange(length) < lengths[:, None]
