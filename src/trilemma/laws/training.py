"""Law 6, training: gradients are right, nothing overflows, weights survive a save, no memory is read unwritten."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trilemma.laws.calls import valid_tokens
from trilemma.laws.case import Case, leaves_of
from trilemma.laws.report import ViolationError
from trilemma.laws.subject import Subject
from trilemma.ragged import Ragged

# Of central differences, which err by the third derivative and by rounding over the step.
_GRADIENT_TOLERANCE = 1e-5
_fresh: Any = torch.utils.deterministic


def training(subject: Subject) -> None:
    """Numerical gradients at odd lengths, bfloat16 at long ones, safetensors and back, NaN-poisoned memory."""
    for case in subject.cases("gradients", torch.float64, 2, 8):
        _gradcheck(case)
        _poison(case)
        _weights(case, subject)
    if subject.slow or subject.full:
        for case in subject.cases("long", torch.bfloat16, 1, 2):
            _long(case, 4096 if subject.full else 1024)


def _gradcheck(case: Case) -> None:
    """Central differences along a random direction of each input and weight, with padding and a carried State."""
    mixer, rows, length = case.mixer, 2, case.pick((1, 3, 5, 7, 9))
    lengths = torch.tensor([length, case.integer(1, length)])
    case.describe(lengths=lengths)
    x, memory = case.normal(rows, length, mixer.d_model, leaf=True), case.memory(rows, leaf=True)
    valid = valid_tokens(lengths, length)
    weights = [case.normal(rows, length, mixer.d_model) for _ in range(3)]
    # Tokens that come again would tie: what ranks its keys has no gradient where two are equal.
    others = case.normal(rows, length, mixer.d_model)
    generator_state = case.generator.get_state()

    def loss() -> Tensor:
        case.generator.set_state(generator_state)  # the same spoiled padding each time
        total = (case.whole(x, lengths, memory) * weights[0])[valid].sum()
        if mixer.causal or memory is not None:
            first, state = case.step(x, case.begin(rows, memory), Ragged(lengths=lengths))
            second, _ = case.step(x * others, state)
            total = total + (first * weights[1])[valid].sum() + (second * weights[2]).sum()
        return total

    leaves = leaves_of(x, memory)
    for name, gradient in case.gradients(loss(), leaves).items():
        leaf = case.named_leaves(leaves)[name]
        direction = case.normal(leaf.numel()).view_as(leaf)
        slope = float((gradient * direction).sum())
        # A kink within a step spoils a difference, but not at every step size.
        errors = [abs(_difference(loss, leaf, direction, step) - slope) for step in (1e-5, 1e-6, 1e-7)]
        if not min(errors) <= _GRADIENT_TOLERANCE * max(1.0, abs(slope)):
            claim = "gradients agree with finite differences"
            raise ViolationError(claim, f"gradient of {name}", error=min(errors), tolerance=_GRADIENT_TOLERANCE)


def _difference(loss: Callable[[], Tensor], leaf: Tensor, direction: Tensor, step: float) -> float:
    kept = leaf.detach().clone()
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            leaf.copy_(kept + sign * step * direction)
            values.append(float(loss()))
        leaf.copy_(kept)
    return (values[0] - values[1]) / (2 * step)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kind return NaN (the largest number for integers)."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _fresh.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    _fresh.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _fresh.fill_uninitialized_memory = before[2]


def _poison(case: Case) -> None:
    rows, length = 2, case.integer(1, 9)
    lengths = case.integers(rows, 0, length)
    case.describe(lengths=lengths)
    x, memory = case.normal(rows, length, case.mixer.d_model, leaf=True), case.memory(rows)
    with poisoned_memory():
        y = case.whole(x, lengths, memory)
        case.finite(y, "y", "fresh memory is never read before it is written")
        for name, gradient in case.gradients(y.sum(), {"x": x}).items():
            case.finite(gradient, f"gradient of {name}", "fresh memory is never read before it is written")
        if case.mixer.causal or memory is not None:
            with torch.no_grad():
                _, state = case.step(x, case.begin(rows, memory), Ragged(lengths=lengths))
                y, _ = case.step(x[[1, 0, 1]], state.select(torch.tensor([1, 0, 1])))
            case.finite(y, "y", "fresh memory is never read before it is written (with a State)")


def _weights(case: Case, subject: Subject) -> None:
    x, memory = case.normal(1, 5, case.mixer.d_model), case.memory(1)
    want = case.whole(x, memory=memory)
    case.describe(weights="safetensors")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in case.mixer.state_dict().items()}, path)
        other = subject.build(case.dtype, case.generator)
        other.load_state_dict(load_file(path))
    generator_state = case.generator.get_state()
    fresh = Case(other, case.dtype, case.generator, case.trace, case.shared)
    got = fresh.whole(x, memory=memory)
    case.generator.set_state(generator_state)
    case.same_bits(got, want, "y", "weights survive a save: nothing that matters lives outside the state dict")


def _long(case: Case, length: int) -> None:
    """Large inputs at a long length, forward and backward, in bfloat16 and under autocast."""
    mixer = case.mixer
    case.describe(length=length)
    memory = case.memory(1)
    x = (3 * case.normal(1, length, mixer.d_model)).requires_grad_()
    y = case.whole(x, memory=memory)
    case.finite(y, "y", f"no overflow in bfloat16 at length {length}")
    for name, gradient in case.gradients(y.float().square().mean(), {"x": x}).items():
        case.finite(gradient, f"gradient of {name}", f"no overflow in bfloat16 at length {length}")
