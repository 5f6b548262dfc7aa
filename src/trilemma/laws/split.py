"""Law 1, split: cutting a sequence into calls never changes the answer, nor its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.laws.calls import draw_plan, padded, run_calls, valid_tokens
from trilemma.laws.case import Case, leaves_of, relative_error
from trilemma.laws.report import NotApplicableError
from trilemma.laws.subject import Subject

_CLAIM = "calls of any size give the whole sequence's outputs"
_LENGTHS = (1, 2, 3, 5, 8, 13, 17, 21, 24)
_LONG = (63, 64, 65, 127, 130)  # around the chunk sizes in use


def split(subject: Subject) -> None:
    """Random calls with a carried State against one call without, forward and backward, in three types.

    The last call stands for the onward behaviour: what it gives depends on the State that all calls before it left.
    """
    if not subject.carries_state:
        raise NotApplicableError("reads whole sequences in both directions; a State is refused (law state)")
    for dtype, quick, full in ((torch.float64, 9, 40), (torch.float32, 3, 12), (torch.bfloat16, 3, 12)):
        for case in subject.cases("split", dtype, quick, full):
            _one(case)


def _one(case: Case) -> None:
    rows = case.integer(1, 3)
    long = case.integer(0, 4) == 0
    length = case.pick(_LONG if long else _LENGTHS)
    lengths = case.integers(rows, 1, length) if case.flip() else torch.full((rows,), length)
    length = int(lengths.max())
    plan = draw_plan(case, lengths, "random" if long else None)
    onward = case.integer(1, 3)
    plan = torch.cat([plan, torch.full((1, rows), onward)])
    total = lengths + onward
    prefix = None
    if subject_reads_prefix(case) and case.flip():
        prefix = case.share(plan[0])
    rewind = case.pick((0, 0, 3))
    capacity = None if case.flip() else int(total.max())
    case.describe(lengths=total, calls=plan, prefix=prefix, rewind=rewind, capacity=capacity)
    x = case.normal(rows, length + onward, case.mixer.d_model, leaf=True)
    memory = case.memory(rows, leaf=True)
    valid = valid_tokens(total, length + onward)
    weights = case.normal(rows, length + onward, case.mixer.d_model) * valid[..., None]

    want = case.whole(x, total, memory, prefix).masked_fill(~valid[..., None], 0)
    got, _ = run_calls(case, x, plan, case.begin(rows, memory, capacity, rewind), prefix)
    got = padded(got, length + onward)
    case.close(got, want, "y", f"{_CLAIM} (under autograd)")
    want_gradients = case.gradients((want * weights).sum(), leaves_of(x, memory))
    got_gradients = case.gradients((got * weights).sum(), leaves_of(x, memory))
    case.same_gradients(
        got_gradients,
        want_gradients,
        "gradients through carried States are the whole sequence's",
        sensitivity=lambda: _sensitivity(case, x, total, memory, prefix, weights),
    )
    with torch.no_grad():
        in_place, _ = run_calls(case, x, plan, case.begin(rows, memory, capacity, rewind), prefix)
    case.close(padded(in_place, length + onward), want, "y", f"{_CLAIM} (in place)")


def _sensitivity(
    case: Case,
    x: Tensor,
    lengths: Tensor,
    memory: tuple[Tensor, Tensor] | None,
    prefix: Tensor | None,
    weights: Tensor,
) -> dict[str, float]:
    """How far float64's gradients of the whole sequence move when every number is rounded to the case's type.

    A norm of a head's output at the first token has the gradient 1 / |q k|: where q k nearly cancels, the eight bits of
    bfloat16 say nothing, and no way of computing is nearer to the truth than another.
    """
    found = []
    for draw in range(9):
        precise, read, remembered = case.in_float64(0 if draw == 0 else torch.finfo(case.dtype).eps, draw, x, memory)
        y = precise.whole(read, lengths, remembered, prefix).masked_fill(weights == 0, 0)
        found.append(precise.gradients((y * weights.double()).sum(), leaves_of(read, remembered)))
    exact, *moved = found
    return {name: max(relative_error(other[name], value) for other in moved) for name, value in exact.items()}


def subject_reads_prefix(case: Case) -> bool:
    """Whether a prefix means something to this mixer."""
    able = case.mixer.capabilities
    return able.prefix and case.mixer.causal and not able.reads_memory


def with_prefix(case: Case, lengths: Tensor) -> Tensor | None:
    """[B] a prefix within each row, or None for mixers that have none."""
    if not subject_reads_prefix(case) or case.flip():
        return None
    return case.share(lengths)
