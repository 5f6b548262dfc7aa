"""Law 3, raggedness: padding, batch-mates, the order of a batch and packed neighbours change nothing.

Legend: B rows, L length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.laws.calls import padded, valid_tokens
from trilemma.laws.case import Case, leaves_of
from trilemma.laws.report import ViolationError
from trilemma.laws.split import with_prefix
from trilemma.laws.subject import Subject
from trilemma.ragged import Ragged


def raggedness(subject: Subject) -> None:
    """Each row gives what it gives alone, whatever lies beside it, behind it, or beyond its end."""
    for case in subject.cases("raggedness", torch.float64, 5, 30):
        _padding(case)
        _order(case)
        _nothing_but_padding(case)
        _no_positions(case)
        if not subject.reads_memory:
            for together in (False, True):
                _packing(case, together)
        if subject.carries_state:
            _waiting_rows(case)


def _alone(
    case: Case, x: Tensor, length: int, memory: tuple[Tensor, Tensor] | None, row: int, prefix: Tensor | None
) -> Tensor:
    """y [1, length, D] of one row without padding; its memory without padding too."""
    if length == 0:
        return x[row : row + 1, :0]
    own = None
    if memory is not None:
        values, lengths = memory
        own = values[row : row + 1, : int(lengths[row])], lengths[row : row + 1]
    return case.whole(x[row : row + 1, :length], memory=own, prefix=None if prefix is None else prefix[row : row + 1])


def _padding(case: Case) -> None:
    rows, length = case.integer(2, 4), case.integer(2, 20)
    lengths = case.integers(rows, 0, length)
    prefix = with_prefix(case, lengths)
    case.describe(lengths=lengths, padded_to=length, prefix=prefix)
    x = case.normal(rows, length, case.mixer.d_model, leaf=True)
    memory = case.memory(rows, leaf=True)
    valid = valid_tokens(lengths, length)
    weights = case.normal(rows, length, case.mixer.d_model) * valid[..., None]
    alone = [_alone(case, x, int(n), memory, row, prefix) for row, n in enumerate(lengths)]
    want = torch.cat([padded(y, length) for y in alone])
    got = case.whole(x, lengths, memory, prefix)
    case.finite(got, "y", "padding gives finite outputs")
    case.close(got, want, "y", "a padded row gives what it gives alone", valid)
    if int(lengths.max()) == 0:
        return
    want_gradients = case.gradients((want * weights).sum(), leaves_of(x, memory))
    got_gradients = case.gradients((got * weights).sum(), leaves_of(x, memory))
    case.same_gradients(got_gradients, want_gradients, "gradients of a padded batch are those of its rows alone")


def _order(case: Case) -> None:
    rows, length = 3, case.integer(2, 12)
    lengths = case.integers(rows, 1, length)
    order = case.permutation(rows)
    case.describe(lengths=lengths, order=order)
    x, memory = case.normal(rows, length, case.mixer.d_model), case.memory(rows)
    y = case.whole(x, lengths, memory)
    moved_memory = None if memory is None else (memory[0][order], memory[1][order])
    moved = case.whole(x[order], lengths[order], moved_memory)
    valid = valid_tokens(lengths, length)
    case.close(moved, y[order], "y", "the order of a batch changes nothing", valid[order])
    strangers = x.clone()
    strangers[1:] = 10 * case.normal(rows - 1, length, case.mixer.d_model)
    other = case.whole(strangers, lengths, memory)
    case.close(other[:1], y[:1], "y", "batch-mates change nothing", valid[:1])


def _nothing_but_padding(case: Case) -> None:
    case.describe(lengths=[0, 0])
    x, memory = case.normal(2, 3, case.mixer.d_model, leaf=True), case.memory(2)
    y = case.whole(x, torch.zeros(2, dtype=torch.int64), memory)
    case.finite(y, "y", "a batch of padding alone gives finite outputs")
    gradients = case.gradients(y.square().sum(), {"x": x})
    for name, gradient in gradients.items():
        case.finite(gradient, f"gradient of {name}", "a batch of padding alone gives finite gradients")


def _no_positions(case: Case) -> None:
    case.describe(shape=[2, 0])
    memory = case.memory(2)
    y = case.whole(case.normal(2, 0, case.mixer.d_model), memory=memory)
    if y.shape != (2, 0, case.mixer.d_model):
        raise ViolationError(f"a call of no positions gives none; found shape {tuple(y.shape)}", "y")


def _packing(case: Case, together: bool) -> None:
    """Rows of several sequences, with padding behind and lengths given together with the segments."""
    rows, length = case.integer(1, 3), case.integer(3, 24)
    segments, lengths = _draw_segments(case, rows, length)
    spare = segments.clone()
    if together:  # lengths alone then say what is padding; the numbers beyond go on or are -1
        spare = torch.where(segments < 0, segments.amax(1, keepdim=True), segments) if case.flip() else segments
    case.describe(segments=spare, lengths=lengths if together else None)
    x = case.normal(rows, length, case.mixer.d_model, leaf=True)
    valid = segments >= 0
    weights = case.normal(rows, length, case.mixer.d_model) * valid[..., None]
    want_rows = []
    for row in range(rows):
        parts = []
        for number in range(int(segments[row].max()) + 1):
            (where,) = (segments[row] == number).nonzero(as_tuple=True)
            parts.append(case.whole(x[row : row + 1, where]))
        want_rows.append(padded(torch.cat(parts, dim=1), length))
    want = torch.cat(want_rows)
    got = case.whole(x, lengths if together else None, segments=spare)
    case.finite(got, "y", "padding gives finite outputs")
    case.close(got, want, "y", "a packed sequence gives what it gives alone", valid)
    want_gradients = case.gradients((want * weights).sum(), {"x": x})
    got_gradients = case.gradients((got * weights).sum(), {"x": x})
    case.same_gradients(got_gradients, want_gradients, "gradients of packed sequences are those of each alone")


def _draw_segments(case: Case, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """[B, L] numbers from 0 with -1 behind, and [B] how many are real."""
    lengths = case.integers(rows, 1, length)
    segments = torch.full((rows, length), -1)
    for row, used in enumerate(lengths.tolist()):
        begin, number = 0, 0
        while begin < used:
            size = case.integer(1, used - begin)
            segments[row, begin : begin + size] = number
            begin, number = begin + size, number + 1
    return segments, lengths


def _waiting_rows(case: Case) -> None:
    """A row of length 0 leaves its State's bits; the next call goes on as if it had not waited."""
    rows, length = 3, case.integer(1, 5)
    case.describe(lengths=[0, length, 0])
    memory = case.memory(rows)
    x = case.normal(rows, 4, case.mixer.d_model)
    waiting = torch.tensor([0, length, 0])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            _, state = case.step(x, case.begin(rows, memory, capacity=16))
            before = state.clone().tensors()
            _, state = case.step(
                case.spoiled(case.normal(rows, length, case.mixer.d_model), valid_tokens(waiting, length)),
                state,
                Ragged(lengths=waiting),
            )
            for name, tensor in state.tensors().items():
                for row in (0, 2):
                    case.same_bits(tensor[row], before[name][row], f"State {name}", "a row of length 0 keeps its State")
