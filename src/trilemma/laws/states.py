"""Law 4, State: every verb of a State commutes with running."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trilemma.errors import CapabilityError
from trilemma.laws.calls import draw_plan, run_calls
from trilemma.laws.case import Case
from trilemma.laws.memory import memory_laws
from trilemma.laws.report import ViolationError
from trilemma.laws.subject import Subject
from trilemma.ragged import Ragged
from trilemma.state import State, load_state, save_state


def states(subject: Subject) -> None:
    """select, clone, rewind, save and load, reserve, autograd's purity, refusals."""
    for case in subject.cases("state", torch.float64, 4, 25):
        _refusals(case)
        if not subject.carries_state:
            continue
        _select(case)
        _clone(case)
        _save(case)
        _purity(case)
        _addresses(case)
        _truncation(case)
        if subject.reads_memory:
            memory_laws(case)
        else:
            _rewind(case)


def _refusals(case: Case) -> None:
    """What a mixer cannot do, it refuses."""
    case.describe(refusals=True)
    mixer, able = case.mixer, case.mixer.capabilities
    x = case.normal(1, 3, mixer.d_model)
    if able.reads_memory:
        _refused(lambda: mixer(x), "a mixer that reads a memory refuses to run without")
        return
    if not mixer.causal:
        _refused(lambda: mixer.init_state(1), "a bidirectional mixer refuses to make a State")
        _refused(lambda: mixer(x, State(), None, case.shared), "a bidirectional mixer refuses a State")
    else:
        segments = torch.zeros(1, 3, dtype=torch.int64)
        packed = Ragged(segments=segments)
        _refused(lambda: mixer(x, mixer.init_state(1), packed, case.shared), "a packed call refuses a State")
        _refused(lambda: mixer.init_state(1, rewind=2).rewind(torch.tensor([1])), "unread tokens are not taken back")
    prefix = torch.tensor([2])
    if not able.prefix:
        _refused(lambda: case.whole(x, prefix=prefix), "a prefix is refused by a mixer that cannot read it")
    elif mixer.causal:
        _, begun = case.step(x, case.begin(1, None))
        _refused(lambda: case.step(x, begun, Ragged(prefix=prefix)), "a prefix after the first call is refused")
        short = Ragged(lengths=torch.tensor([1]), prefix=prefix)
        _refused(lambda: case.step(x, case.begin(1, None), short), "a prefix longer than the first call is refused")


def _refused(action: Callable[[], object], claim: str) -> None:
    try:
        action()
    except CapabilityError:
        return
    raise ViolationError(f"{claim} (CapabilityError)")


def _begun(case: Case, rows: int, rewind: int = 0, capacity: int | None = None) -> State:
    """A State after a random, ragged start."""
    memory = case.memory(rows)
    lengths = case.integers(rows, 0, 9)
    lengths[0] += 1
    x = case.normal(rows, int(lengths.max()), case.mixer.d_model)
    plan = draw_plan(case, lengths)
    case.describe(calls=plan, rewind=rewind)
    _, state = run_calls(case, x, plan, case.begin(rows, memory, capacity, rewind))
    return state


def _select(case: Case) -> None:
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            state = _begun(case, 3, rewind=case.pick((0, 2)))
            rows = case.integers(case.integer(1, 5), 0, 2)  # repeats, drops and permutes
            length = case.integer(1, 4)
            case.trace.case += f", rows={rows.tolist()}"
            x = case.normal(3, length, case.mixer.d_model)
            chosen = state.clone().select(rows)
            want, _ = case.step(x, state)
            got, _ = case.step(x[rows], chosen)
            case.close(got, want[rows], "y", "select(rows), then run = run, then take the rows")


def _clone(case: Case) -> None:
    with torch.no_grad():
        state = _begun(case, 2, rewind=case.pick((0, 2)))
        first, second = state.clone(), state.clone()
        storage = {t.data_ptr() for t in state.tensors().values() if t.numel()}
        for name, tensor in first.tensors().items():
            if tensor.numel() and tensor.data_ptr() in storage:
                raise ViolationError("a clone shares no memory with its original", f"State {name}")
        x = case.normal(2, case.integer(1, 3), case.mixer.d_model)
        more = case.normal(2, 70, case.mixer.d_model)
        y, state = case.step(x, state)
        case.step(more, state)
        again, after = case.step(x, first)
        case.same_bits(again, y, "y", "a clone stays valid while its original runs on")
        repeated, after_again = case.step(x, second)
        case.same_bits(repeated, again, "y", "a call repeated from the same clone gives the same bits")
        for name, tensor in after_again.tensors().items():
            case.same_bits(tensor, after.tensors()[name], f"State {name}", "a repeated call leaves the same State")


def _save(case: Case) -> None:
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        rewind = case.pick((0, 2))
        state = _begun(case, 2, rewind=rewind)
        path = Path(folder) / "state.safetensors"
        save_state(state, path)
        template = case.begin(2, case.memory(2), None, rewind)
        loaded = load_state(template, path)
        x = case.normal(2, 2, case.mixer.d_model)
        want, _ = case.step(x, state)
        got, _ = case.step(x, loaded)
        case.same_bits(got, want, "y", "saving and loading in mid-sequence changes nothing")


def _purity(case: Case) -> None:
    """Under autograd nothing is written to: neither the State given nor x."""
    state = _begun(case, 2, rewind=case.pick((0, 2)))
    before, x = state.clone(), case.normal(2, 3, case.mixer.d_model)
    kept = x.clone()
    case.step(x, state, Ragged(lengths=case.integers(2, 0, 3)))
    case.step(x, state)
    case.same_bits(x, kept, "x", "a mixer does not write to its input")
    for name, tensor in state.tensors().items():
        case.same_bits(
            tensor, before.tensors()[name], f"State {name}", "under autograd a State given is not written to"
        )


def _addresses(case: Case) -> None:
    """With room reserved and autograd off, updates happen at fixed addresses."""
    with torch.no_grad():
        rewind = case.pick((0, 2))
        for reserved in (
            case.begin(2, case.memory(2), 40, rewind),
            case.begin(2, case.memory(2), None, rewind).reserve(40),
        ):
            addresses = _payload(reserved)
            state = reserved
            for lengths in (None, torch.tensor([1, 3]), torch.tensor([0, 2]), None):
                ragged = None if lengths is None else Ragged(lengths=lengths)
                _, state = case.step(case.normal(2, 3, case.mixer.d_model), state, ragged)
                moved = [name for name, place in _payload(state).items() if place != addresses[name]]
                if moved:
                    raise ViolationError("with room reserved no update moves an address", f"State {moved[0]}")


def _payload(state: State) -> dict[str, int]:
    """Where numbers and codes lie; counts of tokens may move."""
    return {name: t.data_ptr() for name, t in state.tensors().items() if t.dtype != torch.int64 and t.numel()}


def _truncation(case: Case) -> None:
    """`detach` cuts gradients, never values."""
    if case.cache is not None:
        return
    memory = case.memory(2)
    x, more = case.normal(2, 3, case.mixer.d_model, leaf=True), case.normal(2, 2, case.mixer.d_model)
    _, state = case.step(x, case.begin(2, memory))
    want, _ = case.step(more, state)
    got, _ = case.step(more, state.detach())
    case.close(got, want, "y", "detach changes no value")
    (gradient,) = torch.autograd.grad(got.sum(), x, allow_unused=True)
    if gradient is not None:
        raise ViolationError("detach cuts the gradient", "gradient of x")


def _rewind(case: Case) -> None:
    """Tokens are taken back several times; what follows is as if they had never been."""
    rows, limit = 3, case.integer(1, 4)
    with torch.set_grad_enabled(case.flip()):
        state = case.begin(rows, None, rewind=limit)
        kept: list[Tensor] = [torch.zeros(0, case.mixer.d_model, dtype=case.dtype)] * rows
        history = []
        for _ in range(case.integer(2, 4)):
            lengths = case.integers(rows, 0, 3 * limit)  # also more than can be taken back
            lengths[case.integer(0, rows - 1)] += 1
            x = case.normal(rows, int(lengths.max()), case.mixer.d_model)
            plan = draw_plan(case, lengths)
            _, state = run_calls(case, x, plan, state)
            kept = [torch.cat([old, x[row, : int(lengths[row])]]) for row, old in enumerate(kept)]
            back = case.integers(rows, 0, limit).minimum(lengths)
            history.append(f"+{lengths.tolist()} as {plan.tolist()} -{back.tolist()}")
            case.describe(rewind=limit, history="; ".join(history))
            state = state.rewind(back)
            kept = [row[: len(row) - int(n)] for row, n in zip(kept, back, strict=True)]
        onward = case.normal(rows, 3, case.mixer.d_model)
        got, _ = case.step(onward, state)
        lengths = torch.tensor([len(row) + 3 for row in kept])
        full = [torch.cat([row, onward[number]]) for number, row in enumerate(kept)]
        x = torch.nn.utils.rnn.pad_sequence(full, batch_first=True)
        whole = case.whole(x, lengths)
        want = torch.stack([whole[row, int(n) - 3 : int(n)] for row, n in enumerate(lengths)])
        case.close(got, want, "y", "after rewind the tokens taken back were never read")
