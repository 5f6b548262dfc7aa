"""The part of law 4 for mixers that read a memory: it is shared, reordered, dropped and extended without a trace."""

from __future__ import annotations

import torch

from trilemma.laws.case import Case
from trilemma.laws.report import ViolationError
from trilemma.mixers.base import MemoryMixer
from trilemma.state import State


def memory_laws(case: Case) -> None:
    """Hypotheses share their source's memory; a memory read in parts is the memory; running appends nothing."""
    _sharing(case)
    _appending(case)
    _read_only(case)


def _sharing(case: Case) -> None:
    sources, group = case.integer(1, 3), case.integer(2, 4)
    memory = case.memory(sources)
    state = case.begin(sources, memory)
    rows = torch.arange(sources).repeat_interleave(group)
    case.describe(sources=sources, group=group)
    beams = state.select(rows)
    if _places(beams) != _places(state):
        raise ViolationError("hypotheses of one source share its memory without a copy", "State")
    x = case.normal(len(rows), case.integer(1, 3), case.mixer.d_model)
    want = torch.cat([case.step(x[i : i + 1], state.select(rows[i : i + 1]))[0] for i in range(len(rows))])
    got, beams = case.step(x, beams)
    case.close(got, want, "y", "a row that shares its memory gives what it gives alone")
    within = torch.cat([number * group + case.integers(group, 0, group - 1) for number in range(sources)])
    reordered = beams.select(within)
    if _places(reordered) != _places(state):
        raise ViolationError("reordering hypotheses within their sources copies no memory", "State")
    got, _ = case.step(x[within], reordered)
    case.close(got, want[within], "y", "reordering hypotheses reorders outputs")
    chosen = case.integers(case.integer(1, len(rows)), 0, len(rows) - 1)  # across sources, some of them dropped
    case.describe(sources=sources, group=group, rows=chosen)
    got, kept = case.step(x[chosen], beams.select(chosen))
    case.close(got, want[chosen], "y", "dropping and mixing sources takes each row's own memory along")
    used = len(rows[chosen].unique())
    if kept.nbytes > state.nbytes or (used == 1 and kept.nbytes == state.nbytes and sources > 1):
        raise ViolationError("sources that nobody reads are dropped", "State", error=float(kept.nbytes))


def _appending(case: Case) -> None:
    mixer = case.mixer
    assert isinstance(mixer, MemoryMixer)
    sources, length = 2, case.integer(2, 9)
    values = case.normal(sources, length, mixer.memory_width)
    cut = case.integer(1, length - 1)
    case.describe(memory=length, cut=cut)
    x = case.normal(sources, 2, mixer.d_model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            want, _ = case.step(x, mixer.remember(values))
            got, _ = case.step(x, mixer.remember(values[:, cut:], None, mixer.remember(values[:, :cut])))
            case.close(got, want, "y", "a memory appended to is the whole memory")
            # rows of unequal first parts
            first = case.integers(sources, 0, length)
            order = torch.arange(length) + first[:, None]
            late = values.gather(1, order.clamp(max=length - 1)[:, :, None].expand_as(values))
            begun = mixer.remember(values, first)
            got, _ = case.step(x, mixer.remember(late, length - first, begun))
            case.close(got, want, "y", "a memory appended to row by row is the whole memory")


def _read_only(case: Case) -> None:
    state = case.begin(2, case.memory(2))
    before = state.clone().tensors()
    with torch.no_grad():
        _, after = case.step(case.normal(2, 3, case.mixer.d_model), state)
    for name, tensor in after.tensors().items():
        case.same_bits(tensor, before[name], f"State {name}", "a reader writes nothing to its memory")


def _places(state: State) -> set[int]:
    return {t.data_ptr() for t in state.tensors().values() if t.is_floating_point() and t.numel()}
