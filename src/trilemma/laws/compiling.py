"""Law 7, compile: the same answers under torch.compile, without a graph break, or a declared reason."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily

from trilemma.laws.calls import valid_tokens
from trilemma.laws.case import Case
from trilemma.laws.report import NotApplicableError, ViolationError
from trilemma.laws.subject import Subject
from trilemma.mixers.base import MemoryMixer
from trilemma.ragged import Ragged
from trilemma.state import State

_STEPS = 6


def compiling(subject: Subject) -> None:
    """Whole calls with and without padding, and steps in place, as one graph each.

    Whole calls are traced by dynamo alone, steps with `aot_eager`, which also checks the writes in place. Level full
    compiles with inductor: the first variant and one that the seed picks (a minute each), all when run one by one.
    """
    declared = subject.example.compiles
    if declared is not True:
        raise NotApplicableError(f"declared: {declared or 'not compiled'}")
    if not (subject.slow or subject.full):
        raise NotApplicableError("level quick compiles the first variant and one that the seed picks")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
        _compile(subject)


def _compile(subject: Subject) -> None:
    inductor = subject.full and subject.slow
    for case in subject.cases("compile", torch.float32, 1, 1):
        torch.compiler.reset()
        try:
            _whole(case, "inductor" if inductor else "eager")
            if subject.carries_state:
                _steps(case, "inductor" if inductor else "aot_eager")
        except RuntimeError as error:
            if not isinstance(error, _dynamo().exc.TorchDynamoException):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ViolationError(f"compiles without a graph break: {' '.join(lines[:2])[:300]}") from None
        finally:
            torch.compiler.reset()


def _dynamo() -> Any:
    """torch's tracer; it takes as long to import as torch itself, and most users of the laws only read a record."""
    return importlib.import_module("torch._dynamo")


def _outside_of_modes(compiled: Callable[..., Any], *arguments: Any) -> Any:
    """A call without the context that places new tensors on a device: the tracer cannot follow it."""
    if torch.get_default_device().type == "cpu":
        return compiled(*arguments)
    with _pop_mode_temporarily():
        return compiled(*arguments)


def _whole(case: Case, backend: str) -> None:
    """Forward and backward of whole sequences."""
    mixer = case.mixer
    rows, length = 2, 11
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    memory = case.memory(rows)
    x = case.normal(rows, length, mixer.d_model, leaf=True)
    weights = case.normal(rows, length, mixer.d_model)
    everywhere = torch.full((rows,), length)
    calls: list[tuple[Tensor, Ragged | None]] = [(everywhere, None)]
    calls.append((torch.tensor([length, 4]), Ragged(lengths=torch.tensor([length, 4]))))
    if not isinstance(mixer, MemoryMixer):
        segments = (torch.arange(length) >= 4).long().expand(rows, -1).contiguous()
        calls.append((everywhere, Ragged(segments=segments)))
    for lengths, ragged in calls:
        case.describe(backend=backend, lengths=lengths, packed=ragged is not None and ragged.is_packed)
        valid = valid_tokens(lengths, length)
        state = case.begin(rows, memory) if isinstance(mixer, MemoryMixer) else None
        want, _ = case.run(x, state, ragged)
        state = case.begin(rows, memory) if isinstance(mixer, MemoryMixer) else None
        got, _ = _outside_of_modes(compiled, x, state, ragged, case.shared or None)
        case.close(got, want, "y", "a compiled call gives the plain call's outputs", valid)
        masked = weights * valid[..., None]
        wanted = case.gradients((want * masked).sum(), {"x": x})
        case.same_gradients(
            case.gradients((got * masked).sum(), {"x": x}), wanted, "compiled gradients are the plain ones"
        )


def _steps(case: Case, backend: str) -> None:
    """Steps at growing context: the same outputs, and few graphs."""
    mixer, rows = case.mixer, 2
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    x = case.normal(rows, _STEPS + 3, mixer.d_model)
    case.describe(backend=backend, steps=_STEPS)
    memory = case.memory(rows)
    with torch.no_grad():
        state = case.begin(rows, memory, capacity=128)
        _, state = case.step(x[:, :3], state)
        plain: State = state.clone()
        _dynamo().utils.counters.clear()
        for number in range(3, _STEPS + 3):
            token = x[:, number : number + 1]
            want, plain = case.step(token, plain)
            got, after = _outside_of_modes(compiled, token, state, None, case.shared or None)
            assert after is not None
            state = after
            case.close(got, want, "y", "compiled steps give the plain steps' outputs")
            graphs = int(_dynamo().utils.counters["stats"]["unique_graphs"])
            if graphs > 3:
                raise ViolationError(
                    f"{_STEPS} steps of one shape make few graphs; found {graphs}", error=float(graphs)
                )
