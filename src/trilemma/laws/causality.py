"""Law 2, causality: what comes later changes nothing that came before; what may matter, does."""

from __future__ import annotations

import torch

from trilemma.laws.case import Case
from trilemma.laws.report import ViolationError
from trilemma.laws.split import subject_reads_prefix
from trilemma.laws.subject import Subject


def causality(subject: Subject) -> None:
    """Another future leaves past outputs and gradients alone; past, prefix and both directions are really read."""
    for case in subject.cases("causality", torch.float64, 4, 20):
        if subject.reads_memory:
            _queries_are_independent(case)
            continue
        if subject.example.causal:
            _future_is_unseen(case)
        _what_is_read(case)


def _future_is_unseen(case: Case) -> None:
    rows, length = case.integer(1, 2), case.integer(2, 30)
    cut = case.integer(1, length - 1)
    prefix = torch.full((rows,), case.integer(0, cut)) if subject_reads_prefix(case) and case.flip() else None
    case.describe(length=length, cut=cut, prefix=prefix)
    x = case.normal(rows, length, case.mixer.d_model, leaf=True)
    with torch.no_grad():
        other = torch.cat([x[:, :cut], 10 * case.normal(rows, length - cut, case.mixer.d_model)], dim=1)
    y = case.whole(x, prefix=prefix)
    changed = case.whole(other, prefix=prefix)
    case.close(changed[:, :cut], y[:, :cut], "y", "another future leaves past outputs as they were")
    weights = case.normal(rows, cut, case.mixer.d_model)
    (gradient,) = torch.autograd.grad((y[:, :cut] * weights).sum(), x)
    late = gradient[:, cut:]
    case.close(late, torch.zeros_like(late), "gradient of x", "past outputs have no gradient at the future")
    state = case.begin(rows, None)
    with torch.no_grad():  # the same with a State, where masks are made in another way
        part, _ = case.run(other, state)
    if prefix is None:
        case.close(part[:, :cut], y[:, :cut], "y", "another future leaves past outputs as they were (with a State)")


def _what_is_read(case: Case) -> None:
    """Neighbours matter: a mixer that reads nothing would pass every other law."""
    x = case.normal(1, 3, case.mixer.d_model, leaf=True)
    y = case.whole(x)
    case.describe(length=3)
    if not _depends(y[:, 1], x, 0):
        raise ViolationError("an output depends on the token before it", "gradient of x", 0)
    if not case.mixer.causal and not _depends(y[:, 0], x, 1):
        raise ViolationError("a bidirectional mixer's output depends on the token after it", "gradient of x", 1)
    if subject_reads_prefix(case):
        y = case.whole(x, prefix=torch.tensor([2]))
        if not _depends(y[:, 0], x, 1):
            raise ViolationError("within a prefix an output depends on the token after it", "gradient of x", 1)
        if _depends(y[:, 1], x, 2):
            raise ViolationError("a prefix token depends on nothing after the prefix", "gradient of x", 2)


def _depends(y: torch.Tensor, x: torch.Tensor, token: int) -> bool:
    weights = torch.linspace(0.3, 1.7, y.shape[-1], dtype=y.dtype)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x, retain_graph=True)
    return bool(gradient[:, token].abs().max() > 0)


def _queries_are_independent(case: Case) -> None:
    """A reader of a memory mixes no positions of its own; it does read the memory."""
    rows, length = case.integer(1, 2), case.integer(2, 9)
    cut = case.integer(1, length - 1)
    case.describe(length=length, cut=cut)
    x = case.normal(rows, length, case.mixer.d_model)
    memory = case.memory(rows, leaf=True)
    assert memory is not None
    y = case.whole(x, memory=memory)
    other = torch.cat([x[:, :cut], 10 * case.normal(rows, length - cut, case.mixer.d_model)], dim=1)
    changed = case.whole(other, memory=memory)
    case.close(changed[:, :cut], y[:, :cut], "y", "other queries leave an output as it was")
    (gradient,) = torch.autograd.grad(y.square().sum(), memory[0])
    valid = torch.arange(gradient.shape[1]) < memory[1][:, None]
    if memory[1].max() > 1 and not bool(gradient[valid].abs().max() > 0):
        raise ViolationError("an output depends on the memory", "gradient of memory")
    case.same_bits(gradient[~valid], torch.zeros_like(gradient[~valid]), "memory", "a memory's padding has no gradient")
